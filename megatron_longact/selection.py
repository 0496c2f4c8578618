"""Selection: sums of all ranks become one global saliency, and the saliency becomes masks.

Every rank ends with the same global tensors, so that masks, metrics and checkpoints need no further
communication. Shape letters: L layers of the whole model, L_r of this rank, nq = np * hn Q channels, nk =
ng * hn K channels, n accumulated channels of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longact.config import LongActConfig, Scope, Select
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.reduction import STATISTICS


class QK(NamedTuple):
    """One tensor of Q channels [L, nq] and one of K channels [L, nk]."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class ModelGroups:
    """The process groups of a model chunk (Megatron's `ProcessGroupCollection`); all sizes may be 1."""

    tp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup

    @classmethod
    def from_collection(cls, collection: Any) -> "ModelGroups":
        """Take the groups out of a `ProcessGroupCollection`."""
        return cls(tp=collection.tp, dp_cp=collection.dp_cp, pp=collection.pp, cp=collection.cp)


def num_selected(ratio: float, n: int) -> int:
    """`floor(ratio * n + 0.5)` in exact decimal, at least 1."""
    share = Decimal(str(ratio)) * n + Decimal("0.5")
    return max(1, min(n, int(share.to_integral_value(rounding=ROUND_FLOOR))))


def select_salient_channels(scores: Tensor, *, ratio: float, select: Select = "high") -> Tensor:
    """The salient channels of each row of scores: fp32 [..., n] -> bool [..., n].

    Exactly `num_selected(ratio, n)` are True in each row: the highest scores, or with select="low" the
    lowest; the others rank the scores they are given like "high". Equal scores go to the
    lower index. Raises `ValueError` for a ratio outside (0, 1] and for scores that are not finite.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}; it must be a share in (0, 1]")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores hold NaN or Inf; no channel can be selected from them")
    return _top(scores, ratio=ratio, select=select)


def _top(scores: Tensor, *, ratio: float, select: Select) -> Tensor:
    """`select_salient_channels` without a look at the scores, which would make the host wait for them."""
    order = scores.argsort(dim=-1, descending=select != "low", stable=True)
    chosen = order[..., : num_selected(ratio, scores.shape[-1])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def select_masks(saliency: QK, *, layout: QKVLayout, config: LongActConfig) -> QK:
    """Masks of the salient channels of the whole model, Q and K ranked apart; bool [L, nq], [L, nk].

    All True for a projection that is not a target. Of a saliency that is not finite they mean nothing.
    """
    masks = (
        _top(_units(scores, layout.kv_channels, config.scope), ratio=config.ratio, select=config.select).view_as(scores)
        for scores in saliency
    )
    return target(QK(*masks), config)


def target(masks: QK, config: LongActConfig) -> QK:
    """The masks, all True for a projection that is not a target."""
    targets = config.targets
    return QK(
        masks.q if "q" in targets else torch.ones_like(masks.q),
        masks.k if "k" in targets else torch.ones_like(masks.k),
    )


def _units(scores: Tensor, hn: int, scope: Scope) -> Tensor:
    """Cut [L, n] into the units of a scope: [L, n], [L, heads, hn] or [1, L * n]."""
    if scope == "head":
        return scores.unflatten(1, (-1, hn))  # [L, heads * hn] -> [L, heads, hn]
    return scores.reshape(1, -1) if scope == "model" else scores


def random_saliency(num_layers: int, layout: QKVLayout, *, seed: int, refresh: int) -> QK:
    """Scores of the random selector: the same on every rank and layout, new at each refresh."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + refresh)
    return QK(
        torch.rand(num_layers, layout.num_q_channels, generator=generator),
        torch.rand(num_layers, layout.num_k_channels, generator=generator),
    )


def is_usable(saliency: QK) -> Tensor:
    """Whether masks can be chosen from it: nothing NaN or Inf; bool []."""
    return torch.isfinite(saliency.q).all() & torch.isfinite(saliency.k).all()


class GlobalSaliency:
    """Turns this rank's sums into the saliency of the whole model, in few small collectives.

    One reduction over data- and context-parallel ranks, one gather over tensor-parallel ranks, and, with
    pipeline parallelism, one sum over its stages: each for all layers together.
    """

    def __init__(
        self,
        groups: ModelGroups,
        layout: QKVLayout,
        config: LongActConfig,
        *,
        layer_numbers: Sequence[int],
        local_layers: Sequence[int],
    ) -> None:
        """layer_numbers: all of the model, ascending; local_layers: those of this rank, in its order."""
        self._groups, self._layout, self._config = groups, layout, config
        self._num_layers = len(layer_numbers)
        self._places = [list(layer_numbers).index(number) for number in local_layers]
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def from_sums(self, sums: Tensor) -> QK:
        """The saliency, alike on all ranks; NaN or Inf somewhere if no token counted, or a bad one: see `is_usable`.

        sums: fp32 [L_r, n + 1], one pass's sums and in the last column its token count. A count beyond
        2^24 is rounded, alike for all channels of a layer: the ranking does not change.
        """
        statistic = STATISTICS[self._config.statistic]
        sums = sums.clone()
        dist.all_reduce(sums, statistic.reduce_op, group=self._groups.dp_cp)
        gathered = self._gather_tp(sums)  # [tp, L_r, n + 1]
        scores = statistic.finish(gathered[..., :-1], gathered[:1, :, -1:])
        tap_norm = self._config.tap == "norm"
        return self._share_pp(self._assemble_heads(scores) if tap_norm else self._assemble_rows(scores))

    def from_rows(self, rows: Tensor) -> QK:
        """Saliency from one score a local row of the fused weight: fp32 [L_r, rows of this shard]."""
        return self._share_pp(self._assemble_rows(self._gather_tp(rows)))

    def from_gradients(self, sums: Tensor, *, scale: Tensor) -> QK:
        """Root mean square of each row's gradient, from the squares and elements that this rank owns.

        sums: fp32 [2, L_r, rows of this shard]; scale: of the loss, which the gradients still have. NaN if those of the
        whole model are zero: nothing can be ranked then.
        """
        sums = sums.clone()
        dist.all_reduce(sums, group=self._groups.dp_cp)
        whole = self.from_rows((sums[0] / sums[1].clamp(min=1)).sqrt() / scale)
        some = torch.maximum(whole.q.amax(), whole.k.amax()) > 0
        return QK(whole.q / some, whole.k / some)  # 0 / 0 is NaN, x / 1 is x

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of Q and of K in the fused weight, and places of this rank's layers; int64, copied to a device once."""
        if device not in self._on:
            places = torch.tensor(self._places, dtype=torch.int64)
            parts = (self._layout.q_rows, self._layout.k_rows, places)
            self._on[device] = tuple(part.to(device) for part in parts)  # type: ignore[assignment]
        return self._on[device]

    def _gather_tp(self, local: Tensor) -> Tensor:
        size = self._groups.tp.size()
        gathered = local.new_empty(size, *local.shape)
        dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=self._groups.tp)
        return gathered

    def _assemble_rows(self, gathered: Tensor) -> QK:
        """[tp, L_r, rows of a shard] -> Q [L_r, nq], K [L_r, nk]: shards are contiguous chunks of rows."""
        rows = gathered.transpose(0, 1).flatten(1)  # [L_r, tp * rows of a shard]
        q_rows, k_rows, _ = self._indices(rows.device)
        return QK(rows[:, q_rows], rows[:, k_rows])

    def _assemble_heads(self, gathered: Tensor) -> QK:
        """[tp, L_r, nq / tp + K channels of a rank] -> Q [L_r, nq], K [L_r, nk].

        With ng < tp, tp / ng neighbouring ranks hold the same K group; the first of them is taken.
        """
        tp, split = gathered.shape[0], self._layout.num_q_channels // gathered.shape[0]
        stride = max(tp // self._layout.num_query_groups, 1)
        q, k = gathered[..., :split], gathered[::stride, :, split:]
        return QK(q.transpose(0, 1).flatten(1), k.transpose(0, 1).flatten(1))

    def _share_pp(self, local: QK) -> QK:
        """Put this stage's layers in their places of the whole model: [L_r, ...] -> [L, ...]."""
        nq, nk = self._layout.num_q_channels, self._layout.num_k_channels
        whole = torch.zeros(self._num_layers, nq + nk, dtype=torch.float32, device=local.q.device)
        if self._places:
            whole[self._indices(whole.device)[2]] = torch.cat(local, dim=1)
        if self._groups.pp.size() > 1:
            dist.all_reduce(whole, group=self._groups.pp)
        return QK(*whole.split([nq, nk], dim=1))
