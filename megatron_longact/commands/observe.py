"""Does this model have outliers in its queries and keys? Measure every Q and K channel of every layer, and look.

A Hugging Face folder:

    longact observe --hf-dir MODEL --lengths 4096 16384

A Megatron checkpoint, with Megatron's own flags, on as many ranks as its layout has:

    torchrun --standalone --nproc-per-node 2 -m megatron_longact observe --load CHECKPOINTS \
        --tensor-model-parallel-size 2 ...

Prompts are RULER's, made on the spot, or those of --prompts FILE. The table, the pictures and the verdict are in
--output (default: runs/observe): overview.png, heatmap-projection.png, heatmap-norm.png, rope.png, observation.json.
"""

from megatron_longact.analysis.activations.models import ModelFlags, check_ratio, opened
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.arguments import ObserveFlags
from megatron_longact.megatron.tool_command import check_file, check_new, end_in_one_line, tool_flags


def main(argv: list[str]) -> int:
    """Observe; the exit status: 2 for unknown choices, 1 for what else is refused."""
    groups = {"model": ModelFlags, "prompts": PromptOptions, "observation": ObserveFlags}
    args, others = tool_flags(argv, groups, about=__doc__)

    def action() -> None:
        check_ratio(args.ratio)
        check_file(args.html, flag="--html")
        check_new(args.output / "observation.json", overwrite=args.overwrite)
        options = PromptOptions.from_args(args)
        with opened(args, others, output=args.output) as session:
            from megatron_longact.analysis.observe import report as observe

            observe.run(
                session, options, statistic=args.statistic, ratio=args.ratio, output=args.output, html=args.html
            )

    return end_in_one_line("observe", action)
