"""What the folders and checkpoints of a command line are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_longact.conversion.torch_dist import iteration_name

_NO_NAMES = ("checkpoints", "hf", "model")


def run_name(path: Path) -> str:
    """What to call a folder of checkpoints or a model: its name, or its parent's where many a folder has that name.

    A snapshot in Hugging Face's cache, .../models--OWNER--NAME/snapshots/HASH, is called NAME.
    """
    return _parts(path)[-1]


def run_names(paths: Sequence[Path]) -> list[str]:
    """What to call several: those of one `run_name` by more of their path, as high/seed-1 and low/seed-1."""
    parts = [_parts(path) for path in paths]
    taken = [1] * len(parts)
    while True:
        names = ["/".join(each[-n:]) for each, n in zip(parts, taken, strict=True)]
        alike = [
            any(name == other and mine != theirs for other, theirs in zip(names, parts, strict=True))
            for name, mine in zip(names, parts, strict=True)
        ]
        if not any(alike):
            return names
        taken = [n + same for n, same in zip(taken, alike, strict=True)]


def _parts(path: Path) -> tuple[str, ...]:
    folder = path.resolve()
    if folder.parent.name == "snapshots":
        return (*folder.parts[1:-3], folder.name, folder.parent.parent.name.rpartition("--")[2])
    return folder.parts[1:-1] if folder.name in _NO_NAMES else folder.parts[1:]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as --load and --ckpt-step name it; step None is the latest."""

    load: Path
    step: int | None
    name: str

    @classmethod
    def find(cls, load: Path, step: int | None, *, run: str) -> Checkpoint:
        """A checkpoint of the run so called. Raises `ValueError` where there is none."""
        return cls(load, step, f"{run} {iteration_name(load, step)}")
