"""How masks move over the updates of a run, in what a checkpoint can hold: a bit and a number a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_longact.selection import QK


@dataclass(frozen=True)
class MaskHistory:
    """Of the masks of all updates; the same on every rank, and made without waiting for the device."""

    all_moved: int = 0
    """The last update that could move rows outside its mask, too, or of which a checkpoint did not tell; 0: none."""

    first: QK | None = None
    """The first mask, bool Q [L, nq] and K [L, nk]."""

    last_active: QK | None = None
    """The last update, counted from 1, in whose mask a row was: int32, same shapes; 0: none that is known of."""

    overlap: Tensor | None = None
    """Rows that the last two masks have in common, and rows in either: fp32 [2]; not in checkpoints."""

    def after_update(self, update: int, active: QK, *, exact: bool, masks: QK | None, before: QK | None) -> MaskHistory:
        """After the update of this number, with `active`; exact: it could move the rows of no others.

        masks: chosen, or kept, for it, if there were any; before: likewise for the one before it.
        """
        last = self.last_active or QK(*(torch.zeros_like(part, dtype=torch.int32) for part in active))
        return MaskHistory(
            all_moved=self.all_moved if exact else update,
            first=self.first or masks,
            last_active=QK(*(old.masked_fill(now, update) for old, now in zip(last, active, strict=True))),
            overlap=None if masks is None or before is None else overlap(masks, before),
        )

    @property
    def ever_active(self) -> QK | None:
        """Rows that were in the mask of an update that is known of; bool, None before the first."""
        return None if self.last_active is None else QK(*(part > 0 for part in self.last_active))

    @property
    def last_moved(self) -> QK | None:
        """The last update that could move each row, int32; None: `all_moved` of all."""
        return None if self.last_active is None else QK(*(part.clamp(min=self.all_moved) for part in self.last_active))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, and copies of the tensors on the host."""
        return {"all_moved": self.all_moved, "first": to_host(self.first), "last_active": to_host(self.last_active)}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], device: torch.device) -> MaskHistory:
        """The history that `state_dict` came from."""
        first, last = (to_device(state_dict[name], device) for name in ("first", "last_active"))
        return cls(all_moved=state_dict["all_moved"], first=first, last_active=last)


def overlap(new: QK, old: QK) -> Tensor:
    """How many channels two masks have in common, and how many either has, over Q and K together: fp32 [2]."""
    a, b = (torch.cat([part.flatten() for part in masks]) for masks in (new, old))
    return torch.stack([(a & b).sum(), (a | b).sum()]).float()


def to_host(pair: QK | None) -> dict[str, Tensor] | None:
    """Copies on the host, by "q" and "k"."""
    return None if pair is None else {"q": pair.q.to("cpu", copy=True), "k": pair.k.to("cpu", copy=True)}


def to_device(pair: dict[str, Tensor] | None, device: torch.device) -> QK | None:
    """What `to_host` made, on a device."""
    return None if pair is None else QK(pair["q"].to(device), pair["k"].to(device))
