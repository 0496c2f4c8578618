"""Megatron → Hugging Face: a torch_dist checkpoint becomes safetensors with index, config.json and tokenizer files.

    longact convert to-hf --load IN --save OUT

IN may be of any layout, and of a training run; config.json and the tokenizer are those in IN/hf, where the way to
Megatron and our launcher put them, or those of the folder that --hf-config names. Stopped half-way, the same command
goes on where it was.
"""

import argparse
from pathlib import Path

from megatron_longact.conversion import command, to_hf
from megatron_longact.conversion.hf_config import DTYPES


def main(argv: list[str]) -> int:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="a checkpoint folder as Megatron's --load takes it")
    parser.add_argument("--hf-config", type=Path, help="folder with config.json and tokenizer files (default: IN/hf)")
    parser.add_argument("--save", type=Path, required=True, help="the Hugging Face folder; must not exist")
    parser.add_argument("--ckpt-step", type=int, help="another iteration than the latest")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest safetensors file (default: 5)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: that of the checkpoint)")
    args = parser.parse_args(argv)
    return command.run(
        lambda: to_hf.convert(
            args.load,
            args.hf_config,
            args.save,
            ckpt_step=args.ckpt_step,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            dtype=DTYPES[args.dtype] if args.dtype else None,
        )
    )
