"""Which Q and K rows really moved, counted in the masters that this process started from.

Masters, and not the model's weights: weights that are kept in FP8 share scales, so that the image of a frozen row
moves when another row moves the scale, and bf16 weights hide what is smaller than a half of their last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_longact.longact import LongAct
from megatron_longact.masked_update import Shard, row_views
from megatron_longact.optimizer_shards import chained, master_shards
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.rl.bf16_changes import Bf16Changes
from megatron_longact.selection import QK


@dataclass(frozen=True)
class RowCounts:
    """Rows of all W_Q and W_K of the model together.

    rows: all of them; moved: those whose masters differ from the start; never_active: those that no mask let
    through; frozen_changed: never active and yet different, which should be 0.
    """

    rows: int
    moved: int
    never_active: int
    frozen_changed: int
    since: int = 0
    """The iteration that they are counted from: where this process began."""


class RowAudit:
    """Keeps this rank's start masters of Q and K on the host, and the union of all masks since."""

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        optimizer: Any,
        longact: LongAct | None,
        *,
        since: int = 0,
        bf16: Bf16Changes | None = None,
    ) -> None:
        """optimizer: what `get_megatron_optimizer` returned; one that we do not know is audited by the weights.

        since: the iteration that this process begins at; bf16: is asked after each step, if it is there.
        """
        self._bf16 = bf16
        self._since = since
        self._longact = longact
        self._model = QKVModel.find(model_chunks)
        weights = [layer.weight for layer in self._model.layers]
        self._shards = [shard for one in chained(optimizer) for shard in master_shards(one, weights)]
        self._start = [_host_copies(shard) for shard in self._shards]
        self._ever = self._model.channels(longact is None)

    def after_step(self) -> dict[str, float | None]:
        """Remember which rows the step let through; what `bf16` has to say of it, collective then."""
        if self._longact is not None:
            pairs = zip(self._ever, self._longact.active, strict=True)
            self._ever = QK(*(old | new.cpu() for old, new in pairs))
        return {} if self._bf16 is None else self._bf16.after_step()

    def count(self) -> RowCounts:
        """Compare with the start; collective, the same on all ranks."""
        everything = self._model.frozen_rows(self._model.channels(False))
        never = self._model.frozen_rows(self._ever)
        totals = torch.zeros(4, dtype=torch.int64)
        for layer, changed in zip(self._model.layers, self._changed_rows(), strict=True):
            qk, frozen = everything[layer.weight].host, never[layer.weight].host
            totals += torch.tensor([len(qk), int(changed[qk].sum()), len(frozen), int(changed[frozen].sum())])
        on_device = totals.cuda()
        for group in (self._model.groups.tp, self._model.groups.pp):
            torch.distributed.all_reduce(on_device, group=group)
        rows, moved, never_active, frozen_changed = on_device.tolist()
        return RowCounts(rows, moved, never_active, frozen_changed, since=self._since)

    def _changed_rows(self) -> list[Tensor]:
        """Of each layer of this rank: bool [local rows], over the slices of all data-parallel ranks."""
        layers = self._model.layers
        changed = {layer.weight: torch.zeros(layer.weight.shape[0], dtype=torch.int32) for layer in layers}
        for shard, start in zip(self._shards, self._start, strict=True):
            for old, new in zip(start, _host_copies(shard), strict=True):
                for view, first in row_views(old != new, shard.start, shard.row_width):
                    changed[shard.parameter][first : first + len(view)] |= view.any(1)
        if not layers:
            return []
        on_device = torch.cat(list(changed.values())).cuda()
        torch.distributed.all_reduce(on_device, op=torch.distributed.ReduceOp.MAX, group=self._model.groups.dp_cp)
        return list(on_device.cpu().bool().split([len(rows) for rows in changed.values()]))


def _host_copies(shard: Shard) -> list[Tensor]:
    return [master.detach().reshape(-1).to("cpu", copy=True) for master in shard.masters()]
