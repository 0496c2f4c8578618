"""What LongAct costs on a cluster, on paper: bytes sent, memory, reads, and the expected share of a step.

    python tools/plan.py --model qwen3-8b --tp 4 --cp 2 --dp 1 --seq-length 32768 --global-batch-size 256

--model takes a built-in name, a Hugging Face folder or a config.json; every --longact-* flag of a training run may
be given. Nothing is started: no ranks, no GPU. What is assumed of the machine is printed last, and each assumption is a
flag. docs/planning.md has the plans of Qwen3-8B, 32B and 235B-A22B up to 1,024 GPUs.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from megatron_longact.arguments import add_longact_args, longact_config_from_args
from megatron_longact.flags import field_docs
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.planning.models import PRESETS, find_model
from megatron_longact.planning.report import make_plan, text
from megatron_longact.planning.roofline import Assumptions
from megatron_longact.planning.run_shape import BYTES, Batch, Parallel


def parser_of_plans() -> argparse.ArgumentParser:
    """The tool's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help=f"A Hugging Face folder, a config.json, or one of {', '.join(PRESETS)}.")
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("dp", "data"), ("ep", "expert")):
        add(f"--{name}", type=int, default=1, help=f"Size of {meaning} parallelism. Default: 1.")
    add("--first-stage-layers", type=int, help="Layers of the first pipeline stage, where they do not divide.")
    add("--last-stage-layers", type=int, help="Layers of the last one.")
    add("--no-distributed-optimizer", action="store_true", help="Every data-parallel rank has whole masters.")
    add("--seq-length", type=int, required=True, help="Tokens of a sequence.")
    add("--micro-batch-size", type=int, default=1, help="Sequences of a forward. Default: 1.")
    add("--global-batch-size", type=int, required=True, help="Sequences of an optimizer step.")
    add("--dtype", choices=BYTES, default="bf16", help="Type of the computation. Default: bf16.")
    add("--all-tokens", action="store_true", help="The program does not name the tokens that count.")
    add("--json", type=Path, metavar="FILE", help="Write all numbers there.")
    group, docs = parser.add_argument_group(title="assumptions"), field_docs(Assumptions)
    for field in fields(Assumptions):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        help_text = f"{docs[field.name]} Default: {field.default:g}."
        group.add_argument(flag, type=kind, default=field.default, help=help_text)
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
            Parallel(
                **{name: getattr(args, name) for name in ("tp", "pp", "cp", "dp", "ep")},
                first_stage_layers=args.first_stage_layers,
                last_stage_layers=args.last_stage_layers,
                distributed_optimizer=not args.no_distributed_optimizer,
            ),
            Batch(
                seq_length=args.seq_length,
                global_batch_size=args.global_batch_size,
                micro_batch_size=args.micro_batch_size,
                dtype=args.dtype,
                tokens_named=not args.all_tokens,
            ),
            config,
            assumed=Assumptions(**{field.name: getattr(args, field.name) for field in fields(Assumptions)}),
            name=args.model,
        )
        print(text(plan))
        if args.json:
            args.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n")

    return end_in_one_line("plan", action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
