"""Would a mask chosen once do? Overlap of the selected Q and K rows across prompts, checkpoints and definitions.

A Hugging Face folder, or several of one shape (checkpoints of a run):

    python tools/stability.py --hf-dir MODEL --lengths 1024 4096 16384

Iterations of a Megatron run, with Megatron's own flags, on as many ranks as its layout has:

    torchrun --standalone --nproc-per-node 2 tools/stability.py --load CHECKPOINTS --ckpt-step 100 200 300 ...

The masks that runs with LongAct made themselves, by checkpoint or file; alone, or beside a model:

    python tools/stability.py --masks CHECKPOINTS mask.safetensors

The table, the pictures and the verdict are in --output (default: runs/stability): matrices.png, curves.png,
stability.json.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from megatron_longact.analysis.activations import models as activations_models
from megatron_longact.config import LongActConfig, Scope, Statistic, Tap
from megatron_longact.megatron.quiet import quiet_libraries
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line


def main(argv: list[str]) -> int:
    """Compare; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    activations_models.add_model_args(parser)
    activations_models.add_prompt_args(parser)
    add = parser.add_argument_group(title="selection").add_argument
    add("--masks", type=Path, nargs="+", default=[], metavar="PATH", help="Masks of runs: checkpoints or mask files.")
    add("--num-seeds", type=int, default=3, help="Sets of prompts, by seed from --sample-seed on. Default: 3.")
    add("--statistic", choices=get_args(Statistic), default="mean-abs", help="Default: mean-abs.")
    add("--tap", choices=get_args(Tap), default="projection", help="Default: projection.")
    add("--scope", choices=get_args(Scope), default="layer", help="Where the top-k is taken. Default: layer.")
    add("--ratio", type=float, default=0.30, help="Share of the rows that are selected. Default: 0.3.")
    add("--output", type=Path, default=Path("runs/stability"), help="Folder for results. Default: runs/stability.")
    add_overwrite_arg(parser)
    args, others = parser.parse_known_args(argv)

    def action() -> None:
        activations_models.check_ratio(args.ratio)
        check_new(args.output / "stability.json", overwrite=args.overwrite)
        config = LongActConfig(ratio=args.ratio, scope=args.scope, statistic=args.statistic, tap=args.tap)
        options = activations_models.prompt_options(args)
        alone = args.masks and not (args.hf_dir or args.load or others)
        models = None if alone else activations_models.opened(args, others, output=args.output)
        from megatron_longact.analysis.stability import report as stability

        stability.run(
            models,
            options,
            config,
            masks=args.masks,
            num_seeds=args.num_seeds,
            output=args.output,
            terminal=sys.stdout,
        )

    return end_in_one_line("stability", action)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
