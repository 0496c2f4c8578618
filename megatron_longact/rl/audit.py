"""Which Q and K rows really moved, over all starts of a run: counted in the masters that each process begins with.

Masters, and not the model's weights: weights that are kept in FP8 share scales, so that the image of a frozen row
moves when another row moves the scale, and bf16 weights hide what is smaller than a half of their last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_longact.config import LongActConfig
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
    """The iteration that they are counted from."""


@dataclass
class RowHistory:
    """What became of the rows of Q and K of the whole model since an iteration: a checkpoint holds it."""

    since: int
    active: QK
    """bool [L, nq] and [L, nk]: some mask let them through."""

    moved: QK
    """bool, likewise: they were seen to differ from what they were."""


class RowAudit:
    """Keeps the masters of Q and K that this rank began with on the host, and what became of the rows since."""

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        optimizer: Any,
        longact: LongAct | None,
        *,
        since: int = 0,
        history: RowHistory | None = None,
        bf16: Bf16Changes | None = None,
    ) -> None:
        """optimizer: what `get_megatron_optimizer` returned; one that we do not know is audited by the weights.

        since: the iteration that this process begins at; history: that of the processes before it, which goes on; bf16:
        is asked after each step, if it is there.
        """
        self._bf16 = bf16
        self._longact = longact
        self._model = QKVModel.find(model_chunks)
        weights = [weight for layer in self._model.layers for weight in layer.weights]
        self._shards = [shard for one in chained(optimizer) for shard in master_shards(one, weights)]
        self._start = [_host_copies(shard) for shard in self._shards]
        self.history = history or RowHistory(
            since, active=self._model.channels(longact is None), moved=self._model.channels(False)
        )
        self._whole = self._model.global_saliency(LongActConfig())

    def after_step(self) -> dict[str, float | None]:
        """Remember which rows the step let through; what `bf16` has to say of it, collective then."""
        if self._longact is not None:
            pairs = zip(self.history.active, self._longact.active, strict=True)
            self.history.active = QK(*(old | new.cpu() for old, new in pairs))
        return {} if self._bf16 is None else self._bf16.after_step()

    def look(self) -> None:
        """See which rows differ from the start, for good; collective, so that a checkpoint can say it."""
        history = self.history
        now = self._whole.from_rows(self._changed_rows())
        history.moved = QK(*(old | (new > 0).cpu() for old, new in zip(history.moved, now, strict=True)))

    def count(self) -> RowCounts:
        """Look, and count; collective, the same on all ranks."""
        self.look()
        active, moved = (
            torch.cat([part.flatten() for part in pair]) for pair in (self.history.active, self.history.moved)
        )
        return RowCounts(
            rows=len(moved),
            moved=int(moved.sum()),
            never_active=int((~active).sum()),
            frozen_changed=int((moved & ~active).sum()),
            since=self.history.since,
        )

    def _changed_rows(self) -> Tensor:
        """Which rows of this rank differ, over all data-parallel ranks' slices: fp32 [layers, rows of a layer]."""
        weights = [weight for layer in self._model.layers for weight in layer.weights]
        changed = {weight: torch.zeros(len(weight)) for weight in weights}
        for shard, start in zip(self._shards, self._start, strict=True):
            for old, new in zip(start, _host_copies(shard), strict=True):
                for view, first in row_views(old != new, shard.start, shard.row_width):
                    changed[shard.parameter][first : first + len(view)][view.any(1)] = 1
        rows = self._model.of_rows(changed.__getitem__).to(self._model.device)
        torch.distributed.all_reduce(rows, op=torch.distributed.ReduceOp.MAX, group=self._model.groups.dp_cp)
        return rows


def _host_copies(shard: Shard) -> list[Tensor]:
    return [master.detach().reshape(-1).to("cpu", copy=True) for master in shard.masters()]
