"""Does this model have outliers in its queries and keys? Measure every Q and K channel of every layer, and look.

A Hugging Face folder:

    python tools/observe.py --hf-dir MODEL --lengths 4096 16384

A Megatron checkpoint, with Megatron's own flags, on as many ranks as its layout has:

    torchrun --standalone --nproc-per-node 2 tools/observe.py --load CHECKPOINTS --tensor-model-parallel-size 2 ...

Prompts are RULER's, made on the spot, or those of --prompts FILE. The table, the pictures and the verdict are in
--output (default: runs/observe): overview.png, heatmap-projection.png, heatmap-norm.png, rope.png, observation.json.
"""

import argparse
import sys
from pathlib import Path

from megatron_longact.analysis.activations import models as activations_models
from megatron_longact.megatron.quiet import quiet_libraries
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line


def main(argv: list[str]) -> int:
    """Observe; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    activations_models.add_model_args(parser)
    activations_models.add_prompt_args(parser)
    add = parser.add_argument_group(title="observation").add_argument
    add("--statistic", choices=["mean-abs", "rms", "max-abs"], default="mean-abs", help="Default: mean-abs.")
    add("--ratio", type=float, default=0.30, help="Share of channels whose part of the total is told. Default: 0.3.")
    add("--output", type=Path, default=Path("runs/observe"), help="Folder for results. Default: runs/observe.")
    add_overwrite_arg(parser)
    args, others = parser.parse_known_args(argv)

    def action() -> None:
        activations_models.check_ratio(args.ratio)
        check_new(args.output / "observation.json", overwrite=args.overwrite)
        options = activations_models.prompt_options(args)
        with activations_models.opened(args, others, output=args.output) as session:
            from megatron_longact.analysis.observe import report as observe

            observe.run(session, options, statistic=args.statistic, ratio=args.ratio, output=args.output)

    return end_in_one_line("observe", action)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
