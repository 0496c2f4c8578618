"""Which Q and K rows really moved, counted against the weights that this process started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_longact.longact import LongAct
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.selection import QK


@dataclass(frozen=True)
class RowCounts:
    """Rows of all W_Q and W_K of the model together.

    rows: all of them; moved: those whose weights differ from the start; never_active: those that no mask let
    through; frozen_changed: never active and yet different, which should be 0.
    """

    rows: int
    moved: int
    never_active: int
    frozen_changed: int


class RowAudit:
    """Keeps the start weights of Q and K on the host, and the union of all masks since."""

    def __init__(self, model_chunks: Sequence[nn.Module], longact: LongAct | None) -> None:
        self._longact = longact
        self._model = QKVModel.find(model_chunks)
        self._start = [_host_copy(layer.weight) for layer in self._model.layers]
        self._ever = self._model.channels(longact is None)

    def after_step(self) -> None:
        """Remember which rows the step let through."""
        if self._longact is None:
            return
        masks = self._longact.state.masks
        if masks is None:  # a dense warm-up step, or one without a usable saliency, which updates none
            warmup = self._longact.state.updates <= self._longact.config.warmup_steps
            masks = self._model.channels(warmup)
        self._ever = QK(*(old | new.cpu() for old, new in zip(self._ever, masks, strict=True)))

    def count(self) -> RowCounts:
        """Compare with the start; collective, the same on all ranks. The weights must be in sync."""
        everything = self._model.frozen_rows(self._model.channels(False))
        never = self._model.frozen_rows(self._ever)
        totals = torch.zeros(4, dtype=torch.int64)
        for layer, start in zip(self._model.layers, self._start, strict=True):
            changed = (_host_copy(layer.weight) != start).any(-1)
            qk, frozen = everything[layer.weight].host, never[layer.weight].host
            totals += torch.tensor([len(qk), int(changed[qk].sum()), len(frozen), int(changed[frozen].sum())])
        on_device = totals.cuda()
        for group in (self._model.groups.tp, self._model.groups.pp):
            torch.distributed.all_reduce(on_device, group=group)
        return RowCounts(*on_device.tolist())


def _host_copy(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
