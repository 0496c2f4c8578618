"""What LongAct remembers between steps and in checkpoints, what is due when, and one optimizer step."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_longact.config import LongActConfig, flag
from megatron_longact.masked_update import FrozenRows, StrictFreeze
from megatron_longact.selection import QK

_NOT_COMPARED = ("on_mismatch", "import_mask")
"""Settings that a run may resume without: they say how it starts."""

_SELECTING = ("ratio", "select", "statistic", "tap", "scope", "targets", "warmup_steps")
"""Settings that say which rows are chosen; `seed` does where the choice is random."""


@dataclass(frozen=True)
class LongActState:
    """Counters, saliency and masks; the same on every rank."""

    updates: int = 0
    """Successful optimizer steps seen."""

    refreshes: int = 0
    """Selections made."""

    rejected: int = 0
    """Refreshes without a counted token, or with NaN or Inf: the mask stayed."""

    saliency: QK | None = None
    """fp32 Q [L, np * hn] and K [L, ng * hn], smoothed."""

    masks: QK | None = None
    """bool, same shapes; True: the row is updated."""

    last_moved: QK | None = None
    """int32, same shapes: the last update that could move the channel's rows, 0 for none; None: `updates` for all."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and copies of the tensors on the host."""
        return {
            "updates": self.updates,
            "refreshes": self.refreshes,
            "rejected": self.rejected,
            "saliency": _to_host(self.saliency),
            "masks": _to_host(self.masks),
            "last_moved": _to_host(self.last_moved),
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], device: torch.device) -> "LongActState":
        """The state that `state_dict` came from; other keys are ignored."""
        return cls(
            updates=state_dict["updates"],
            refreshes=state_dict["refreshes"],
            rejected=state_dict["rejected"],
            saliency=_to_device(state_dict["saliency"], device),
            masks=_to_device(state_dict["masks"], device),
            last_moved=_to_device(state_dict.get("last_moved"), device),  # older checkpoints do not have it
        )

    def after_update(self, active: QK, *, exact: bool) -> "LongActState":
        """The state when the optimizer has stepped with these channels; exact: it could move the rows of no others."""
        updates = self.updates + 1
        last = self.last_moved or QK(*(torch.full_like(part, self.updates, dtype=torch.int32) for part in active))
        moved = active if exact else QK(*map(torch.ones_like, active))
        last = QK(*(old.masked_fill(part, updates) for old, part in zip(last, moved, strict=True)))
        return replace(self, updates=updates, last_moved=last)


@dataclass(eq=False)
class Step:
    """One optimizer step: made by a refresh, ended by a commit, or left behind when Megatron skips it."""

    pending: LongActState
    """What becomes the state when the optimizer has stepped."""

    active: QK
    """Channels whose rows this step may move: bool [L, nq] and [L, nk]."""

    frozen: FrozenRows
    """The other rows of this rank's parameters."""

    waiting: set[StrictFreeze]
    """Those whose inner optimizer has not stepped yet."""

    tokens: Tensor
    """Counted in each layer of this rank, by their weights: fp32 [layers]; 0 if nothing was read."""

    squares: Tensor
    """Squared gradient norms of this rank's frozen rows and of all its Q and K rows; fp32 [2]."""


def in_warmup(state: LongActState, config: LongActConfig) -> bool:
    """Whether the next update is a dense one, before the first mask."""
    return state.updates < config.warmup_steps


def refresh_due(state: LongActState, config: LongActConfig) -> bool:
    """Whether the next update begins with a new saliency, and outside warm-up with new masks."""
    if in_warmup(state, config):
        return config.smooths_saliency and state.updates % max(config.refresh_interval, 1) == 0
    if state.masks is None:
        return not config.import_mask
    interval = config.refresh_interval
    return interval > 0 and (state.updates - config.warmup_steps) % interval == 0


def import_due(state: LongActState, config: LongActConfig) -> bool:
    """Whether the next update begins with the masks of `config.import_mask`."""
    return bool(config.import_mask) and state.masks is None and not in_warmup(state, config)


def capture_due(state: LongActState, config: LongActConfig) -> bool:
    """Whether the forward passes of the next update are read."""
    return config.reads_activations and refresh_due(state, config)


def changed_settings(saved: dict[str, Any], config: LongActConfig) -> str:
    """The settings of a checkpoint that differ from those given now, as `--flag old -> new`; "" if none.

    Raises `ValueError` that names them if `config.on_mismatch` is "error".
    """
    now = asdict(config)
    names = [name for name in now if name not in _NOT_COMPARED and saved.get(name) != now[name]]
    differ = ", ".join(f"{flag(name)} {saved.get(name)} -> {now[name]}" for name in names)
    if differ and config.on_mismatch == "error":
        raise ValueError(
            f"the checkpoint was made with another LongAct configuration: {differ}; give the same flags, or "
            "--longact-on-mismatch use-flags"
        )
    return differ


def unusable(state: LongActState, config: LongActConfig) -> str:
    """What is said of a refresh that is rejected."""
    why = "no token counted, activations of Q or K hold NaN or Inf, or a token weighs less than 0"
    if config.select == "gradient":
        why = "the gradients of all rows of Q and K are zero, or one is NaN or Inf"
    then = "Q and K get no update" if state.masks is None else "the mask stays"
    return (
        f"LongAct could not select at update {state.updates + 1}: {why}; {then}, and longact/rejected_refreshes "
        "counts it"
    )


def selects_otherwise(saved: dict[str, Any], config: LongActConfig) -> bool:
    """Whether the masks of a checkpoint are not those that this configuration would have chosen."""
    now, names = asdict(config), _SELECTING + (("seed",) if config.select == "random" else ())
    return any(saved.get(name) != now[name] for name in names)


def _to_host(pair: QK | None) -> dict[str, Tensor] | None:
    return None if pair is None else {"q": pair.q.to("cpu", copy=True), "k": pair.k.to("cpu", copy=True)}


def _to_device(pair: dict[str, Tensor] | None, device: torch.device) -> QK | None:
    return None if pair is None else QK(pair["q"].to(device), pair["k"].to(device))
