"""What LongAct costs on a cluster, on paper: bytes sent, memory, reads, and the expected share of a step.

    longact plan --model qwen3-8b --tp 4 --cp 2 --dp 1 --seq-length 32768 --global-batch-size 256

--model takes a built-in name, a Hugging Face folder or a config.json; every --longact-* flag of a training run may
be given. Nothing is started: no ranks, no GPU. What is assumed of the machine is printed last, and each assumption is a
flag. docs/planning.md has the plans of Qwen3-8B, 32B and 235B-A22B up to 1,024 GPUs.
"""

import argparse
import json
from pathlib import Path

from megatron_longact.arguments import add_longact_args, longact_config_from_args
from megatron_longact.flags import add_groups, config_from_flags
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.planning.models import PRESETS, find_model
from megatron_longact.planning.report import make_plan, text
from megatron_longact.planning.roofline import Assumptions
from megatron_longact.planning.run_shape import Batch, Parallel
from megatron_longact.planning.shared_prompts import Sharing


def parser_of_plans() -> argparse.ArgumentParser:
    """The tool's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help=f"A Hugging Face folder, a config.json, or one of {', '.join(PRESETS)}.")
    add("--json", type=Path, metavar="FILE", help="Write all numbers there.")
    add_groups(
        parser, {"parallel layout": Parallel, "step": Batch, "shared prompts": Sharing, "assumptions": Assumptions}
    )
    add_overwrite_arg(parser)
    add_longact_args(parser)
    return parser


def main(argv: list[str]) -> int:
    """Plan; the exit status: 2 for what the parser refuses, 1 for sizes that do not fit each other."""
    args = parser_of_plans().parse_args(argv)
    args.longact = True

    def action() -> None:
        check_new(args.json, overwrite=args.overwrite, flag="--json")
        config = longact_config_from_args(args)
        assert config is not None
        plan = make_plan(
            find_model(args.model),
            config_from_flags(Parallel, args),
            config_from_flags(Batch, args),
            config,
            assumed=config_from_flags(Assumptions, args),
            name=args.model,
            group=config_from_flags(Sharing, args).group(args.seq_length),
        )
        print(text(plan))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n")

    return end_in_one_line("plan", action)
