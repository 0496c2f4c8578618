"""Hugging Face → Megatron: a folder of safetensors becomes a torch_dist checkpoint that any TP, PP and EP can load.

    python tools/convert_hf_to_megatron.py --hf-dir IN --save OUT
    python tools/convert_hf_to_megatron.py --hf-dir IN --dry-run     # the whole plan, from IN/config.json alone

Then a run needs `--pretrained-checkpoint OUT --load RUN --save RUN --use-checkpoint-args`, RUN being the folder of its
own checkpoints, and tools that look at the model `--load OUT --use-checkpoint-args`. Stopped half-way, the same command
goes on where it was. What is converted and what is refused: docs/checkpoints.md.
"""

import argparse
import sys
from pathlib import Path

from megatron_longact.conversion import command, plan, to_megatron


def main(args: argparse.Namespace) -> int:
    """Convert, or show the plan."""
    if args.dry_run:
        return command.run(lambda: plan.plan(args.hf_dir))
    return command.run(lambda: to_megatron.convert(args.hf_dir, args.save))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--save", type=Path, help="the checkpoint; must not exist")
    parser.add_argument("--dry-run", action="store_true", help="print names, shapes and sizes; needs no weights")
    arguments = parser.parse_args()
    if not (arguments.save or arguments.dry_run):
        parser.error("--save OUT is needed, or --dry-run")
    sys.exit(main(arguments))
