"""LongAct's masks and saliency out of a Megatron checkpoint, under Hugging Face names.

    longact export-mask --load IN --save mask.safetensors

For each layer N, from 0: `model.layers.N.self_attn.q_proj` and `.k_proj`, bool [rows], True where LongAct updates the
row of that weight; and the same names with `.saliency`, fp32 [rows]. `--longact-import-mask` and `longact audit`
read the file.
"""

import argparse
from pathlib import Path

from megatron_longact.megatron.quiet import quiet_libraries
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new


def main(argv: list[str]) -> int:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="a checkpoint folder as Megatron's --load takes it")
    parser.add_argument("--save", type=Path, required=True, help="the mask file")
    parser.add_argument("--ckpt-step", type=int, help="another iteration than the latest")
    parser.add_argument("--union", action="store_true", help="rows that any step of the RL program's run updated")
    add_overwrite_arg(parser)
    args = parser.parse_args(argv)
    quiet_libraries()
    from megatron_longact.conversion import command, masks

    def export() -> str:
        check_new(args.save, overwrite=args.overwrite, flag="--save")
        return masks.export(args.load, args.save, ckpt_step=args.ckpt_step, union=args.union)

    return command.run(export)
