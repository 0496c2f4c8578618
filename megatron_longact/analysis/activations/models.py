"""The models that the tools are given, one after the other: Hugging Face folders, or Megatron checkpoints."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_longact.analysis.activations.checkpoints import Checkpoint
from megatron_longact.analysis.activations.measurement import ModelSource
from megatron_longact.analysis.activations.prompts import DEFAULT_LENGTHS, DEFAULT_TASKS, PromptOptions
from megatron_longact.megatron.tool_command import megatron_flags
from megatron_longact.tasks.pieces import TASK_TEMPLATE

RULER_FILES = ("essays", "words", "squad", "hotpotqa")


@dataclass(frozen=True)
class Session:
    """The models of a command; `first` is the process that writes and speaks, on `terminal`."""

    sources: Iterator[ModelSource]
    terminal: TextIO
    first: bool


def add_model_args(parser: ArgumentParser) -> None:
    """Flags that say which model, how it is run, and where results go."""
    add = parser.add_argument_group(title="model").add_argument
    add("--hf-dir", type=Path, nargs="+", default=[], metavar="DIR", help="Hugging Face folders.")
    add(
        "--load",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="Megatron checkpoints, with Megatron's own flags for the model, or --use-checkpoint-args.",
    )
    add("--ckpt-step", type=int, nargs="+", default=[], metavar="N", help="Iterations of --load. Default: the latest.")
    add("--device", help="Hugging Face: where to run. Default: cuda, else cpu.")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="Hugging Face. Default: float32.",
    )
    add("--tokenizer", type=Path, help="Hugging Face: another folder's tokenizer, or a SentencePiece file.")
    add("--cpu", action="store_true", help="Run Megatron on the CPU; without a GPU that happens by itself.")


def add_prompt_args(parser: ArgumentParser) -> None:
    """Flags that say on which prompts."""
    add = parser.add_argument_group(title="prompts").add_argument
    add("--tasks", nargs="+", metavar="TASK", help=f"RULER's tasks. Default: {' '.join(DEFAULT_TASKS)}.")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help=f"Prompt lengths. Default: {' '.join(map(str, DEFAULT_LENGTHS))}; with --prompts as long as they are.",
    )
    add("--num-samples", type=int, default=4, help="Prompts of each task and length. Default: 4.")
    add("--sample-seed", type=int, default=42, help="Seed of the prompts. Default: 42.")
    add(
        "--prompts",
        type=Path,
        help="Instead of RULER: a text file, or a .jsonl file with text or tokens.",
    )
    add(
        "--model-template",
        default=TASK_TEMPLATE,
        help="Text that the model wants around a prompt, with {task_template} in it; \\n is a newline. Default: none.",
    )
    for name in RULER_FILES:
        add(f"--{name}", type=Path, help=f"RULER: its {name} file, as in tools/evaluate.py. Default: built in.")


def prompt_options(args: Namespace) -> PromptOptions:
    """What the flags ask for; `ValueError` for what makes no sense."""
    if args.prompts is not None and args.tasks:
        raise ValueError("--tasks are RULER's; they do not go with --prompts")
    lengths = tuple(sorted(set(args.lengths or (() if args.prompts else DEFAULT_LENGTHS))))
    return PromptOptions(
        tasks=(args.prompts.stem,) if args.prompts else tuple(dict.fromkeys(args.tasks or DEFAULT_TASKS)),
        lengths=lengths or (None,),
        num_samples=args.num_samples,
        seed=args.sample_seed,
        file=args.prompts,
        model_template=args.model_template.replace("\\n", "\n"),
        sources={name: path for name in RULER_FILES if (path := getattr(args, name)) is not None},
    )


def check_ratio(ratio: float) -> None:
    """`ValueError` if it is no share."""
    if not 0 < ratio <= 1:
        raise ValueError(f"--ratio is {ratio}; it must be a share in (0, 1]")


@contextmanager
def opened(args: Namespace, megatron_flags: Sequence[str], *, output: Path) -> Iterator[Session]:
    """The models of the flags; Megatron's output goes into a file in `output`.

    Raises `ValueError` if the flags name none, or both kinds, or flags that nobody knows.
    """
    if bool(args.hf_dir) == bool(args.load):
        raise ValueError("give a model: either --hf-dir DIR or --load DIR")
    if args.load:
        with _megatron(args, list(megatron_flags), output) as session:
            yield session
        return
    if megatron_flags:
        raise ValueError(f"unknown with --hf-dir: {' '.join(megatron_flags)}")
    yield Session(_hugging_face(args), sys.stdout, True)


def _hugging_face(args: Namespace) -> Iterator[ModelSource]:
    import torch

    from megatron_longact.analysis.activations.hf import open_folder

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for folder in args.hf_dir:
        yield open_folder(folder, tokenizer=args.tokenizer, device=device, dtype=args.dtype)


@contextmanager
def _megatron(args: Namespace, flags: list[str], output: Path) -> Iterator[Session]:
    checkpoints = [Checkpoint.find(load, step) for load in args.load for step in (args.ckpt_step or [None])]
    flags = megatron_flags(flags, cpu=args.cpu)
    from megatron_longact.analysis.activations.megatron import megatron_sources
    from megatron_longact.reporting.run_log import MEGATRON_LOG, output_in_file

    with output_in_file(output / MEGATRON_LOG) as terminal:
        first = int(os.environ.get("RANK", "0")) == 0
        yield Session(megatron_sources(checkpoints, flags), terminal, first)
