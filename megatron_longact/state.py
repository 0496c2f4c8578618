"""What LongAct remembers between steps and in checkpoints, what is due when, and one optimizer step."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_longact.config import LongActConfig, flag
from megatron_longact.mask_history import MaskHistory, to_device, to_host
from megatron_longact.masked_update import FrozenRows, StrictFreeze
from megatron_longact.selection import QK

_NOT_COMPARED = ("on_mismatch", "import_mask")
"""Settings that a run may resume without: they say how it starts."""

_SELECTING = ("ratio", "select", "scope", "targets", "warmup_steps")
"""Settings that say which rows are chosen by their scores."""

_MEASURING = {"activations": ("statistic", "tap", "min_context", "skip_first_tokens"), "random": ("seed",)}
"""Settings that say what the scores are of, by what they are made from."""


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

    history: MaskHistory = field(default_factory=MaskHistory)
    """Of the masks, up to the last update."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and copies of the tensors on the host."""
        return {
            "updates": self.updates,
            "refreshes": self.refreshes,
            "rejected": self.rejected,
            "saliency": to_host(self.saliency),
            "masks": to_host(self.masks),
            "history": self.history.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], device: torch.device) -> "LongActState":
        """The state that `state_dict` came from; other keys are ignored.

        In a checkpoint without a history it begins there, with the masks there as its first.
        """
        masks, known = to_device(state_dict["masks"], device), state_dict.get("history")
        begun = MaskHistory(all_moved=state_dict["updates"], first=masks)
        return cls(
            updates=state_dict["updates"],
            refreshes=state_dict["refreshes"],
            rejected=state_dict["rejected"],
            saliency=to_device(state_dict["saliency"], device),
            masks=masks,
            history=MaskHistory.from_state_dict(known, device) if known else begun,
        )

    def after_update(self, active: QK, *, exact: bool, before: QK | None) -> "LongActState":
        """The state when the optimizer has stepped with these channels; exact: it could move the rows of no others.

        before: the masks of the step before.
        """
        updates = self.updates + 1
        history = self.history.after_update(updates, active, exact=exact, masks=self.masks, before=before)
        return replace(self, updates=updates, history=history)

    def without_masks(self) -> "LongActState":
        """As if none was chosen yet; which rows were ever active is not forgotten."""
        return replace(self, masks=None, history=replace(self.history, first=None))

    def to_go_on(self, saved: dict[str, Any], config: LongActConfig) -> "LongActState":
        """Without the masks, and without the scores to smooth with, that another configuration has other ones of."""
        now = asdict(config)
        if _measured(saved) != _measured(now):
            return replace(self.without_masks(), saliency=None)
        return self if all(saved.get(name) == now[name] for name in _SELECTING) else self.without_masks()


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
    now, saved = asdict(config), {"hysteresis": 0.0, **saved}  # as it was before there was the setting
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


def _measured(settings: dict[str, Any]) -> tuple[Any, ...]:
    """What the scores are of; high and low have the same ones."""
    select = str(settings.get("select"))
    of = "activations" if select in ("high", "low") else select
    return of, *(settings.get(name) for name in _MEASURING.get(of, ()))
