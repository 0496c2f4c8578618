"""What would FP8 do to the selection? The rows that Transformer Engine's recipes select, against those of bf16.

    python tools/emulate_fp8.py --hf-dir MODEL --tasks niah_multikey_1 fwe qa_1 --lengths 1024

An emulation, which needs no GPU: weights and inputs of the linear layers go through torch's float8 types with the
scales that the recipes give them, and are multiplied in fp32. Columns, of Q and of K: overlap of the masks (Jaccard),
the lowest of a layer, which layer that is (from 0), rows selected that bf16 does not select, mean relative change of
the scores.
Results are in --output (default: runs/fp8): fp8.json.
"""

import argparse
import sys
from pathlib import Path

from megatron_longact.analysis.activations import models as activations_models
from megatron_longact.config import LongActConfig
from megatron_longact.megatron.quiet import quiet_libraries
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line


def main(argv: list[str]) -> int:
    """Emulate; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-dir", type=Path, required=True, help="A Hugging Face folder.")
    parser.add_argument("--ratio", type=float, default=0.30, help="Share of the rows that are selected. Default: 0.3.")
    parser.add_argument(
        "--linears", choices=["qkv", "all"], default="all", help="Linear layers in FP8: linear_qkv alone, or all. all."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fp8"), help="Folder for results. Default: runs/fp8.")
    activations_models.add_prompt_args(parser)
    add_overwrite_arg(parser)
    args = parser.parse_args(argv)

    def action() -> None:
        activations_models.check_ratio(args.ratio)
        from megatron_longact.analysis.activations.hf import open_folder
        from megatron_longact.analysis.fp8 import report

        check_new(args.output / report.RESULTS, overwrite=args.overwrite)
        options = activations_models.prompt_options(args)
        report.run(
            open_folder(args.hf_dir),
            options,
            LongActConfig(ratio=args.ratio),
            linears=args.linears,
            output=args.output,
            terminal=sys.stdout,
        )

    return end_in_one_line("emulate_fp8", action)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
