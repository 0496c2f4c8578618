"""Would a mask chosen once do? Overlap of the selected Q and K rows across prompts, checkpoints and definitions.

A Hugging Face folder, or several of one shape (checkpoints of a run):

    longact stability --hf-dir MODEL --lengths 1024 4096 16384

Iterations of a Megatron run, with Megatron's own flags, on as many ranks as its layout has:

    torchrun --standalone --nproc-per-node 2 -m megatron_longact stability --load CHECKPOINTS --ckpt-step 100 200 ...

The masks that runs with LongAct made themselves, by checkpoint or file; alone, or beside a model:

    longact stability --masks CHECKPOINTS mask.safetensors

The table, the pictures and the verdict are in --output (default: runs/stability): matrices.png, curves.png,
stability.json.
"""

import sys

from megatron_longact.analysis.activations.models import ModelFlags, check_ratio, opened
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.arguments import StabilityFlags
from megatron_longact.config import LongActConfig
from megatron_longact.megatron.tool_command import check_file, check_new, end_in_one_line, tool_flags


def main(argv: list[str]) -> int:
    """Compare; the exit status: 2 for unknown choices, 1 for what else is refused."""
    groups = {"model": ModelFlags, "prompts": PromptOptions, "selection": StabilityFlags}
    args, others = tool_flags(argv, groups, about=__doc__)

    def action() -> None:
        check_ratio(args.ratio)
        check_file(args.html, flag="--html")
        check_new(args.output / "stability.json", overwrite=args.overwrite)
        for margin in args.hysteresis:
            LongActConfig(hysteresis=margin)
        config = LongActConfig(ratio=args.ratio, scope=args.scope, statistic=args.statistic, tap=args.tap)
        options = PromptOptions.from_args(args)
        alone = args.masks and not (args.hf_dir or args.load or others)
        models = None if alone else opened(args, others, output=args.output)
        from megatron_longact.analysis.stability import report as stability

        stability.run(
            models,
            options,
            config,
            masks=list(args.masks),
            num_seeds=args.num_seeds,
            mixed=args.mixed_seeds,
            margins=args.hysteresis,
            output=args.output,
            html=args.html,
            terminal=sys.stdout,
        )

    return end_in_one_line("stability", action)
