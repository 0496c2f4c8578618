"""What would FP8 do to the selection? The rows that Transformer Engine's recipes select, against those of bf16.

    longact emulate-fp8 --hf-dir MODEL --tasks niah_multikey_1 fwe qa_1 --lengths 1024

An emulation, which needs no GPU: weights and inputs of the linear layers go through torch's float8 types with the
scales that the recipes give them, and are multiplied in fp32. Columns, of Q and of K: overlap of the masks (Jaccard),
the lowest of a layer, which layer that is (from 0), rows selected that bf16 does not select, mean relative change of
the scores.
Results are in --output (default: runs/fp8): fp8.json.
"""

import argparse
import sys

from megatron_longact.analysis.activations.models import check_ratio
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.arguments import Fp8Flags
from megatron_longact.flags import add_groups
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line


def main(argv: list[str]) -> int:
    """Emulate; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_groups(parser, {"fp8": Fp8Flags, "prompts": PromptOptions})
    add_overwrite_arg(parser)
    args = parser.parse_args(argv)

    def action() -> None:
        check_ratio(args.ratio)
        from megatron_longact.analysis.activations.hf import open_folder
        from megatron_longact.analysis.fp8 import report

        check_new(args.output / report.RESULTS, overwrite=args.overwrite)
        report.run(
            open_folder(args.hf_dir),
            PromptOptions.from_args(args),
            ratio=args.ratio,
            linears=args.linears,
            output=args.output,
            terminal=sys.stdout,
        )

    return end_in_one_line("emulate_fp8", action)
