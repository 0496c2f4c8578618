"""LongAct's masks and saliency out of a Megatron checkpoint, under Hugging Face names.

    python tools/export_mask.py --load IN --save mask.safetensors

For each layer N, from 0: `model.layers.N.self_attn.q_proj` and `.k_proj`, bool [rows], True where LongAct updates the
row of that weight; and the same names with `.saliency`, fp32 [rows]. `--longact-import-mask` and tools/audit_update.py
read the file.
"""

import argparse
import sys
from pathlib import Path

from megatron_longact.megatron.quiet import quiet_libraries
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new


def main(args: argparse.Namespace) -> int:
    """Export."""
    quiet_libraries()
    from megatron_longact.conversion import command, masks

    def export() -> str:
        check_new(args.save, overwrite=args.overwrite, flag="--save")
        return masks.export(args.load, args.save, ckpt_step=args.ckpt_step)

    return command.run(export)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="a checkpoint folder as Megatron's --load takes it")
    parser.add_argument("--save", type=Path, required=True, help="the mask file")
    parser.add_argument("--ckpt-step", type=int, help="another iteration than the latest")
    add_overwrite_arg(parser)
    sys.exit(main(parser.parse_args()))
