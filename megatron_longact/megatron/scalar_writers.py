"""Where Megatron's own flags send scalars: TensorBoard (`--tensorboard-dir`), Weights & Biases (`--wandb-project`)."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.training import global_vars


class ScalarWriter:
    """What both get: Megatron's `SummaryWriter`, and its `wandb` module with a run begun; either may be None."""

    def __init__(self, tensorboard: Any | None, wandb: Any | None) -> None:
        self._tensorboard = tensorboard
        self._wandb = wandb

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        """A number, at an iteration that is not before the last one: W&B drops what comes late."""
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log({name: value}, step=iteration)

    def add_text(self, name: str, text: str, iteration: int) -> None:
        """A text, for TensorBoard alone."""
        if self._tensorboard is not None:
            self._tensorboard.add_text(name, text, iteration)

    def close(self) -> None:
        """End W&B's run, as Megatron's `pretrain` does; TensorBoard's writer stays open for Megatron."""
        if self._wandb is not None:
            self._wandb.finish()


def scalar_writer() -> ScalarWriter | None:
    """That of Megatron's flags, on the rank that has one; None on others, and before Megatron is initialised."""
    tensorboard, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
    return None if tensorboard is None and wandb is None else ScalarWriter(tensorboard, wandb)


def settle_wandb(args: Namespace) -> None:
    """Name W&B's run and its folder as the run folder where the flags do not: Megatron puts them into --save.

    Called on parsed arguments: Megatron begins W&B's run as soon as it has validated them. Raises ValueError, before a
    rank waits for another, where the package is missing.
    """
    run_dir = getattr(args, "run_dir", None)
    if not getattr(args, "wandb_project", None) or run_dir is None:
        return
    if find_spec("wandb") is None:
        raise ValueError("--wandb-project needs the package wandb: pip install wandb")
    args.wandb_exp_name = args.wandb_exp_name or Path(run_dir).resolve().name
    args.wandb_save_dir = args.wandb_save_dir or run_dir
