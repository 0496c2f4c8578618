"""What the folders and checkpoints of a command line are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_longact.conversion.torch_dist import latest_iteration

_NO_NAMES = ("checkpoints", "hf", "model")


def run_name(path: Path) -> str:
    """What to call a folder of checkpoints or a model: its name, or its parent's where many a folder has that name.

    A snapshot in Hugging Face's cache, .../models--OWNER--NAME/snapshots/HASH, is called NAME.
    """
    folder = path.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.parent.name if folder.name in _NO_NAMES else folder.name


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as --load and --ckpt-step name it; step None is the latest."""

    load: Path
    step: int | None
    name: str

    @classmethod
    def find(cls, load: Path, step: int | None) -> Checkpoint:
        """Raises `ValueError` where there is none."""
        latest = latest_iteration(load)
        name = latest if step is None else str(step)
        if name.isdecimal() and not (load / f"iter_{int(name):07d}").is_dir():
            there = sorted(int(path.name[5:]) for path in load.glob("iter_*"))
            raise ValueError(f"--load {load} has no iteration {name}, it has {', '.join(map(str, there))}")
        return cls(load, step, f"{run_name(load)} {name}")
