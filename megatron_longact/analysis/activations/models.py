"""The models that the tools are given, one after the other: Hugging Face folders, or Megatron checkpoints."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

from megatron_longact.analysis.activations.checkpoints import Checkpoint, run_names
from megatron_longact.analysis.activations.measurement import ModelSource
from megatron_longact.flags import Flag, config_from_flags
from megatron_longact.megatron.tool_command import megatron_flags


@dataclass(frozen=True)
class Session:
    """The models of a command; `first` is the process that writes and speaks, on `terminal`."""

    sources: Iterator[ModelSource]
    terminal: TextIO
    first: bool

    def say(self, remark: str) -> None:
        """A line for the user, if there is anything in it."""
        if self.first and remark:
            print(remark, file=self.terminal, flush=True)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which models, and how they are run."""

    hf_dir: Annotated[tuple[Path, ...], Flag(metavar="DIR")] = ()
    """Hugging Face folders."""
    load: Annotated[tuple[Path, ...], Flag(metavar="DIR")] = ()
    """Megatron checkpoints, with Megatron's own flags for the model, or --use-checkpoint-args."""
    ckpt_step: Annotated[tuple[int, ...], Flag(metavar="N")] = ()
    """Iterations of --load. Default: the latest."""
    device: str | None = None
    """Hugging Face: where to run. Default: cuda, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Hugging Face."""
    tokenizer: Path | None = None
    """Hugging Face: another folder's tokenizer, or a SentencePiece file."""
    cpu: bool = False
    """Run Megatron on the CPU; without a GPU that happens by itself."""


def check_ratio(ratio: float) -> None:
    """`ValueError` if it is no share."""
    if not 0 < ratio <= 1:
        raise ValueError(f"--ratio is {ratio}; it must be a share in (0, 1]")


@contextmanager
def opened(args: Namespace, megatron_flags: Sequence[str], *, output: Path) -> Iterator[Session]:
    """The models of the flags; Megatron's output goes into a file in `output`.

    Raises `ValueError` if the flags name none, or both kinds, or flags that nobody knows.
    """
    models: ModelFlags = config_from_flags(ModelFlags, args)
    if bool(models.hf_dir) == bool(models.load):
        raise ValueError("give a model: either --hf-dir DIR or --load DIR")
    if models.load:
        with _megatron(models, list(megatron_flags), output) as session:
            yield session
        return
    if megatron_flags:
        raise ValueError(f"unknown with --hf-dir: {' '.join(megatron_flags)}")
    if models.ckpt_step:
        raise ValueError("--ckpt-step goes with --load, not with --hf-dir")
    yield Session(_hugging_face(models), sys.stdout, True)


def _hugging_face(models: ModelFlags) -> Iterator[ModelSource]:
    import torch

    from megatron_longact.analysis.activations.hf import open_folder

    device = models.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    for folder, name in zip(models.hf_dir, run_names(models.hf_dir), strict=True):
        yield open_folder(folder, name=name, tokenizer=models.tokenizer, device=device, dtype=models.dtype)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


@contextmanager
def _megatron(models: ModelFlags, flags: list[str], output: Path) -> Iterator[Session]:
    checkpoints = [
        Checkpoint.find(load, step, run=run)
        for load, run in zip(models.load, run_names(models.load), strict=True)
        for step in (models.ckpt_step or [None])
    ]
    flags = megatron_flags(flags, cpu=models.cpu)
    from megatron_longact.analysis.activations.megatron import megatron_sources
    from megatron_longact.reporting.run_log import MEGATRON_LOG, output_in_file

    with output_in_file(output / MEGATRON_LOG) as terminal:
        first = int(os.environ.get("RANK", "0")) == 0
        yield Session(megatron_sources(checkpoints, flags), terminal, first)
