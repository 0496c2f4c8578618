"""What moved as bf16 shows it: elements whose value in bf16 is another one than before the step, or at the start.

A model is served in bf16. Most steps of a small learning rate are smaller than half of the last bit of a weight in
bf16, so that a row that moved in its fp32 master may look as it did. Counted are the masters, rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_longact.longact import LongAct
from megatron_longact.masked_update import FrozenRows, Shard, row_views
from megatron_longact.optimizer_shards import chained, master_shards
from megatron_longact.qkv_layers import QKVModel

MODEL, QK = "bf16/changed_model", "bf16/changed_qk"
"""Share of the elements of the whole model, and of W_Q and W_K, that the step changed; SINCE: since the start."""
SINCE = "_since_start"
ACTIVE, FROZEN = "bf16/changed_qk_active", "bf16/changed_qk_frozen"
"""Share of the elements that the step changed of the rows of W_Q and W_K that it could move, and of the others."""


class Bf16Changes:
    """Keeps two bf16 copies of what this rank owns of the masters on the host: at the start, and after the last step.

    The start is where this process began. An element that several ranks own is counted by each of them.
    """

    def __init__(self, model_chunks: Sequence[nn.Module], optimizer: Any, longact: LongAct | None) -> None:
        """optimizer: what `get_megatron_optimizer` returned; one that we do not know is read in the weights."""
        self._longact, self._model = longact, QKVModel.find(model_chunks)
        parameters = [p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad]
        self._shards = [shard for one in chained(optimizer) for shard in master_shards(one, parameters)]
        self._start = [_shown(shard) for shard in self._shards]
        self._last = list(self._start)

    def after_step(self) -> dict[str, float | None]:
        """The shares, by name; None for rows of which there are none. Collective, alike on all ranks."""
        model = torch.zeros(3, dtype=torch.float64)  # changed by the step, since the start, elements
        weights = [weight for layer in self._model.layers for weight in layer.weights]
        rows = {weight: torch.zeros(3, len(weight), dtype=torch.float64) for weight in weights}
        for place, shard in enumerate(self._shards):
            new = _shown(shard)
            changed = [new != old[place] for old in (self._last, self._start)]
            self._last[place] = new
            if not _is_counted(shard.parameter, self._model.groups.tp):
                continue
            model += torch.tensor([*(int(part.sum()) for part in changed), len(new)], dtype=torch.float64)
            if shard.parameter in rows:
                for which, part in enumerate((*changed, torch.ones_like(changed[0]))):
                    for view, first in row_views(part, shard.start, shard.row_width):
                        rows[shard.parameter][which, first : first + len(view)] += view.sum(1)
        everything = self._model.frozen_rows(self._model.channels(False))
        frozen = everything if self._longact is None else self._model.frozen_rows(self._longact.active)
        return _shares(_of_all_ranks(torch.cat([model, *_sums(rows, everything, frozen, self._longact is None)])))


def _shown(shard: Shard) -> Tensor:
    return shard.masters()[0].detach().reshape(-1).to("cpu", torch.bfloat16, copy=True)


def _is_counted(parameter: nn.Parameter, tp_group: Any) -> bool:
    """Whether this rank counts it: not a copy of another tensor-parallel rank's, or of another stage's."""
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, tp_group=tp_group)


def _sums(rows: dict[nn.Parameter, Tensor], qk: FrozenRows, frozen: FrozenRows, dense: bool) -> tuple[Tensor, Tensor]:
    """Over all layers, of the rows of Q and K and of the frozen ones among them: fp64 [3] each."""
    total, still = torch.zeros(2, 3, dtype=torch.float64)
    for weight, counts in rows.items():
        total += counts[:, qk[weight].host].sum(1)
        if not dense:
            still += counts[:, frozen[weight].host].sum(1)
    return total, still


def _of_all_ranks(counts: Tensor) -> list[float]:
    on_device = counts.cuda()
    torch.distributed.all_reduce(on_device)
    numbers: list[float] = on_device.tolist()
    return numbers


def _shares(counts: list[float]) -> dict[str, float | None]:
    model, qk, frozen = counts[:3], counts[3:6], counts[6:]
    active = [a - b for a, b in zip(qk, frozen, strict=True)]
    shares = {MODEL: model[0], MODEL + SINCE: model[1], QK: qk[0], QK + SINCE: qk[1], ACTIVE: active[0]}
    owned = {MODEL: model[2], QK: qk[2], ACTIVE: active[2]}
    shares[FROZEN], owned[FROZEN] = frozen[0], frozen[2]
    return {name: changed / of if (of := owned[name.removesuffix(SINCE)]) else None for name, changed in shares.items()}
