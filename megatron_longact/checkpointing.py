"""State of ours in Megatron's checkpoints.

It rides in the optimizer-parameter scheduler's state, which Megatron saves as plain values in every checkpoint
format, also when it saves asynchronously, loads at any parallel layout, and leaves alone with `--finetune`
and `--no-load-optim`. Source: megatron/training/checkpointing.py, `generate_state_dict`, `load_checkpoint`.
"""

import logging
import os
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.serialization import load_common_state_dict

from megatron_longact.conversion.torch_dist import TRACKER

logger = logging.getLogger(__name__)

_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


class Stateful(Protocol):
    """Something with a state: a plain dict, equal on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """The state now."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        ...


def carry_state(opt_param_scheduler: Any, name: str, stateful: Stateful) -> None:
    """Let the scheduler's `state_dict` and `load_state_dict` carry that of `stateful` under `name`.

    A checkpoint without it loads too: `stateful` is then left as it is. May be called once for each name.
    """
    save, load = opt_param_scheduler.state_dict, opt_param_scheduler.load_state_dict

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = save()
        assert name not in state, f"two states are called {name}"
        return {**state, name: stateful.state_dict()}

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        load({key: value for key, value in state_dict.items() if key != name})
        if name in state_dict:
            stateful.load_state_dict(state_dict[name])

    opt_param_scheduler.state_dict = state_dict
    opt_param_scheduler.load_state_dict = load_state_dict


def check_load(args: Namespace) -> None:
    """Before a run: mend what a killed one left in `--load`, and hold its model's shape against the flags.

    Works on rank 0 alone. Raises `ValueError` as `mend_tracker` and `check_model_shape` do.
    """
    if os.environ.get("RANK", "0") == "0":
        mend_tracker(getattr(args, "load", None))
        check_model_shape(args)


def mend_tracker(folder: str | None) -> None:
    """Let the tracker file name the newest complete checkpoint if a run was killed while it wrote that file.

    Megatron ends with exit code 0, having trained nothing, when the file is empty. It is written after the
    checkpoint that it names is complete. Raises `ValueError` if no complete checkpoint lies beside it.
    """
    tracker = Path(folder or "", TRACKER)
    if folder is None or not tracker.is_file():
        return
    text = tracker.read_text().strip()
    if text.isdecimal() or text == "release":
        return
    complete = sorted(path.parent.name for path in tracker.parent.glob("iter_*/metadata.json"))
    if not complete:
        raise ValueError(
            f"{tracker} says {text!r} instead of an iteration, and no complete checkpoint lies beside it; write the "
            "iteration to load into it, or delete it to begin anew"
        )
    mended = tracker.with_suffix(".mended")
    mended.write_text(str(int(complete[-1].removeprefix("iter_"))))
    mended.replace(tracker)
    logger.warning("%s said %r: a run was killed while it wrote it; it names %s now", tracker, text, complete[-1])


def check_model_shape(args: Namespace) -> None:
    """Raise `ValueError` if `--load` or `--pretrained-checkpoint` holds a model of another shape.

    Reads the arguments that Megatron saved in the checkpoint; what either side does not say is not compared,
    and neither is a checkpoint that was not saved with `--ckpt-format torch_dist`.
    """
    if getattr(args, "use_checkpoint_args", False):
        return
    for flag in ("load", "pretrained_checkpoint"):
        saved = _saved_args(getattr(args, flag, None), getattr(args, "ckpt_step", None))
        pairs = {name: (getattr(saved, name, None), getattr(args, name, None)) for name in _SHAPE}
        differ = [f"{name} {old} there, {new} here" for name, (old, new) in pairs.items() if old and new and old != new]
        if differ:
            folder = getattr(args, flag)
            raise ValueError(
                f"--{flag.replace('_', '-')} {folder} holds a model of another shape: {', '.join(differ)}; give the "
                "flags that it was made with, or --use-checkpoint-args"
            )


def _saved_args(folder: str | None, ckpt_step: int | None) -> Namespace | None:
    tracker = Path(folder or "", TRACKER)
    if folder is None or not tracker.is_file():
        return None
    iteration = str(ckpt_step or tracker.read_text().strip())
    path = Path(folder, f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
    if not (path / "metadata.json").is_file():
        return None
    with warnings.catch_warnings(action="ignore"):  # that no process group is there yet is as it should be
        return load_common_state_dict(path).get("args")
