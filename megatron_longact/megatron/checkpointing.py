"""State of ours in Megatron's checkpoints.

It rides in the optimizer-parameter scheduler's state, which Megatron saves as plain values in every checkpoint
format, also when it saves asynchronously, loads at any parallel layout, and leaves alone with `--finetune`
and `--no-load-optim`. Source: megatron/training/checkpointing.py, `generate_state_dict`, `load_checkpoint`.
"""

import logging
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from megatron.core.dist_checkpointing.serialization import load_common_state_dict

from megatron_longact.conversion.torch_dist import TRACKER

logger = logging.getLogger(__name__)

_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")

_SCHEDULE = (
    *("train_iters", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_warmup_iters"),
    *("lr_warmup_fraction", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)


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


def say_if_there(opt_param_scheduler: Any, name: str, message: str) -> None:
    """Say, on rank 0, where a checkpoint has a state of that name, which this run does not go on with.

    On stderr: the RL program's stdout is a file.
    """
    load = opt_param_scheduler.load_state_dict

    def load_state_dict(state_dict: dict[str, Any], *rest: Any, **kwargs: Any) -> None:
        if name in state_dict and os.environ.get("RANK", "0") == "0":
            print("megatron_longact:", message, file=sys.stderr, flush=True)
        load(state_dict, *rest, **kwargs)

    opt_param_scheduler.load_state_dict = load_state_dict


def check_load(args: Namespace) -> None:
    """Before a run: mend what a killed one left in `--load`, and hold its model's shape against the flags.

    Works on rank 0 alone. Raises `ValueError` as `mend_tracker` and `check_model_shape` do.
    """
    if os.environ.get("RANK", "0") == "0":
        check_converted(args)
        mend_tracker(getattr(args, "load", None))
        check_model_shape(args)


def check_converted(args: Namespace) -> None:
    """Raise `ValueError` for a Hugging Face folder where a checkpoint of Megatron belongs: it would start at random."""
    for flag in ("load", "pretrained_checkpoint"):
        folder = Path(getattr(args, flag, None) or "")
        if (folder / "config.json").is_file() and not (folder / TRACKER).exists():
            raise ValueError(
                f"--{flag.replace('_', '-')} {folder} is a Hugging Face folder: convert it first, with "
                f"python -m megatron_longact convert to-megatron --hf-dir {quote(str(folder))} --save OUT, and give OUT"
            )


def resume_note(args: Namespace) -> str | None:
    """What to say of flags with which a second start does not go on from the first one's checkpoints."""
    load, save = getattr(args, "load", None), getattr(args, "save", None)
    if not load or not save or same_folder(load, save) or not holds_checkpoint(load):
        return None
    return (
        f"--load {load} is not --save {save}: started again, this command would not go on with its own checkpoints; "
        f"{right_pair(args)} does"
    )


def right_pair(args: Namespace) -> str:
    """Flags with which a command goes on with its own checkpoints when it is started again."""
    start = args.pretrained_checkpoint or (args.load if args.load and not same_folder(args.load, args.save) else None)
    save = quote(str(args.save))
    pair = f"--load {save} --save {save}"
    return f"--pretrained-checkpoint {quote(str(start))} {pair}" if start else pair


def holds_checkpoint(folder: str) -> bool:
    """Whether Megatron finds a checkpoint there."""
    return (Path(folder) / TRACKER).is_file()


def same_folder(first: str | Path, second: str | Path) -> bool:
    """Whether both name one folder."""
    return Path(first).resolve() == Path(second).resolve()


def check_schedule(args: Namespace) -> None:
    """Raise `ValueError` where Megatron would refuse to go on from `--load` by an assertion: another schedule.

    Megatron counts it in samples, so `--train-iters` and `--global-batch-size` are a part of it.
    """
    own = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    saved = None if own or args.finetune or args.no_load_optim else saved_args(args.load, args.ckpt_step)
    if saved is None or not args.train_iters or getattr(saved, "train_iters", None) is None:
        return
    if _schedule(saved) == _schedule(args):
        return
    pairs = {name: (getattr(saved, name, None), getattr(args, name)) for name in _SCHEDULE}
    if pairs["lr_decay_iters"] == (saved.train_iters, None):  # Megatron wrote it down, nobody gave it
        del pairs["lr_decay_iters"]
    differ = [f"--{name.replace('_', '-')} {old} there, {new} here" for name, (old, new) in pairs.items() if old != new]
    raise ValueError(
        f"--load {args.load} has another schedule of learning rate and weight decay ({', '.join(differ)}): give "
        "--override-opt_param-scheduler for that of these flags, or --use-checkpoint-opt_param-scheduler for its own"
    )


def _schedule(args: Namespace) -> tuple[Any, ...]:
    size, decay = args.global_batch_size, args.lr_decay_iters or args.train_iters
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else args.lr_warmup_fraction * decay
    rates = (args.lr, args.min_lr, args.lr_decay_style)
    weight_decay = (args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style)
    return *rates, *weight_decay, warmup * size, decay * size, args.train_iters * size


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
        saved = saved_args(getattr(args, flag, None), getattr(args, "ckpt_step", None))
        pairs = {name: (_size(saved, name), _size(args, name)) for name in _SHAPE}
        differ = [f"{name} {old} there, {new} here" for name, (old, new) in pairs.items() if old and new and old != new]
        if differ:
            folder = getattr(args, flag)
            raise ValueError(
                f"--{flag.replace('_', '-')} {folder} holds a model of another shape: {', '.join(differ)}; give the "
                "flags that it was made with, or --use-checkpoint-args"
            )


def _size(args: Namespace | None, name: str) -> Any:
    """Of the model; Megatron writes the number of groups into the arguments of a model without groups as it runs."""
    if name == "num_query_groups" and not getattr(args, "group_query_attention", True):
        name = "num_attention_heads"
    return getattr(args, name, None)


def saved_args(folder: str | None, ckpt_step: int | None) -> Namespace | None:
    """The arguments that a torch_dist checkpoint was saved with; None where there is none."""
    tracker = Path(folder or "", TRACKER)
    if folder is None or not tracker.is_file():
        return None
    iteration = str(ckpt_step or tracker.read_text().strip())
    path = Path(folder, f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
    if not (path / "metadata.json").is_file():
        return None
    with warnings.catch_warnings(action="ignore"):  # that no process group is there yet is as it should be
        return load_common_state_dict(path).get("args")
