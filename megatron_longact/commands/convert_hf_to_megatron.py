"""Hugging Face → Megatron: a folder of safetensors becomes a torch_dist checkpoint that any TP, PP and EP can load.

    longact convert to-megatron --hf-dir IN --save OUT
    longact convert to-megatron --hf-dir IN --dry-run     # the whole plan, from IN/config.json alone

Then a run needs `--pretrained-checkpoint OUT --load RUN --save RUN --use-checkpoint-args`, RUN being the folder of its
own checkpoints, and tools that look at the model `--load OUT --use-checkpoint-args`. Stopped half-way, the same command
goes on where it was. What is converted and what is refused: docs/checkpoints.md.
"""

import argparse
from pathlib import Path

from megatron_longact.conversion import command, plan, to_megatron


def main(argv: list[str]) -> int:
    """Convert, or show the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", type=Path, required=True, help="folder with config.json and safetensors")
    parser.add_argument("--save", type=Path, help="the checkpoint; must not exist")
    parser.add_argument("--dry-run", action="store_true", help="print names, shapes and sizes; needs no weights")
    args = parser.parse_args(argv)
    if not (args.save or args.dry_run):
        parser.error("--save OUT is needed, or --dry-run")
    if args.dry_run:
        return command.run(lambda: plan.plan(args.hf_dir))
    return command.run(lambda: to_megatron.convert(args.hf_dir, args.save))
