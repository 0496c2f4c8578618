"""Selection: sums of all ranks become one global saliency, and the saliency becomes masks.

Every rank ends with the same global tensors, so that masks, metrics and checkpoints need no further
communication. Shape letters: L layers of the whole model, L_r of this rank, nq Q channels, nk K channels, n rows, or
with tap norm accumulated channels, of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longact.attention_layout import AttentionLayout, Section, ShardedLayout
from megatron_longact.config import LongActConfig, Scope, Select
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
    return max(1, min(n, _share(ratio, n)))


def _share(ratio: float, n: int) -> int:
    """`floor(ratio * n + 0.5)` in exact decimal."""
    share = Decimal(str(ratio)) * n + Decimal("0.5")
    return int(share.to_integral_value(rounding=ROUND_FLOOR))


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


def _top(
    scores: Tensor, *, ratio: float, select: Select, before: Tensor | None = None, hysteresis: float = 0.0
) -> Tensor:
    """`select_salient_channels` without a look at the scores, which would make the host wait for them.

    before: bool like the result; with `hysteresis` its channels stay down to that share of the selected ones behind
    the last of them, and the highest of the others take the places that are left. Everything is a matter of ranks.
    """
    order = scores.argsort(dim=-1, descending=select != "low", stable=True)
    n = scores.shape[-1]
    count = num_selected(ratio, n)
    if before is not None and hysteresis > 0:
        rank = order.argsort(dim=-1)
        stays = before & (rank < min(n, count + _share(hysteresis, count)))
        order = (rank - n * stays).argsort(dim=-1)  # those that stay first, each part by rank
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def select_masks(saliency: QK, *, layout: AttentionLayout, config: LongActConfig, before: QK | None = None) -> QK:
    """Masks of the salient channels of the whole model, each section ranked apart; bool [L, nq], [L, nk].

    before: the masks until now, for `config.hysteresis`. All True for a projection that is not a target. Of a saliency
    that is not finite they mean nothing.
    """
    sections = layout.q_sections, layout.k_sections
    old = before or QK(*map(torch.zeros_like, saliency))
    return target(QK(*(_masks(*part, config) for part in zip(saliency, old, sections, strict=True))), config)


def _masks(scores: Tensor, before: Tensor, sections: Sequence[Section], config: LongActConfig) -> Tensor:
    sizes = [section.channels for section in sections]
    masks = []
    for part, old, section in zip(scores.split(sizes, dim=1), before.bool().split(sizes, dim=1), sections, strict=True):
        units, held = (_units(each, section.width, config.scope) for each in (part, old))
        mask = _top(units, ratio=config.ratio, select=config.select, before=held, hysteresis=config.hysteresis)
        masks.append(mask.view(part.shape))
    return torch.cat(masks, dim=1)


def target(masks: QK, config: LongActConfig) -> QK:
    """The masks, all True for a projection that is not a target."""
    targets = config.targets
    return QK(
        masks.q if "q" in targets else torch.ones_like(masks.q),
        masks.k if "k" in targets else torch.ones_like(masks.k),
    )


def _units(scores: Tensor, width: int, scope: Scope) -> Tensor:
    """Cut [L, channels] into the units of a scope: [L, channels], [L, heads, width] or [1, L * channels]."""
    if scope == "head":
        return scores.unflatten(1, (-1, width))
    return scores.reshape(1, -1) if scope == "model" else scores


def random_saliency(num_layers: int, layout: AttentionLayout, *, seed: int, refresh: int) -> QK:
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
        sharded: ShardedLayout,
        config: LongActConfig,
        *,
        num_layers: int,
        places: Sequence[int],
    ) -> None:
        """num_layers: of the whole model; places: of this rank's layers among them, in its order."""
        self._groups, self._sharded, self._config = groups, sharded, config
        self._norm = config.tap == "norm" and config.reads_activations
        self._num_layers = num_layers
        self._places = places
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def from_sums(self, sums: Tensor) -> QK:
        """The saliency, alike on all ranks; NaN or Inf somewhere if no token counted, or a bad one: see `is_usable`.

        sums: fp32 [L_r, n + 1], one pass's sums and in the last column its token count. A count beyond
        2^24 is rounded, alike for all channels of a layer: the ranking does not change.
        """
        statistic = STATISTICS[self._config.statistic]
        sums = sums.clone()
        dist.all_reduce(sums, statistic.reduce_op, group=self._groups.dp_cp)
        gathered = self._gather_tp(sums)  # [tp, L_r, n + 1]
        for columns in () if self._norm else self._sharded.partial:
            gathered[0, :, columns] = statistic.over_ranks(gathered[..., columns])
        scores = statistic.finish(gathered[..., :-1], gathered[:1, :, -1:])
        return self._share_pp(self._assemble(scores))

    def from_rows(self, rows: Tensor) -> QK:
        """Saliency from one score a local row: fp32 [L_r, n]."""
        return self._share_pp(self._assemble(self._gather_tp(rows)))

    def from_gradients(self, sums: Tensor, *, scale: Tensor) -> QK:
        """Root mean square of each row's gradient, from the squares and elements that this rank owns.

        sums: fp32 [2, L_r, n]; scale: of the loss, which the gradients still have. NaN if those of the
        whole model are zero: nothing can be ranked then.
        """
        sums = sums.clone()
        dist.all_reduce(sums, group=self._groups.dp_cp)
        whole = self.from_rows((sums[0] / sums[1].clamp(min=1)).sqrt() / scale)
        some = torch.maximum(whole.q.amax(), whole.k.amax()) > 0
        return QK(whole.q / some, whole.k / some)  # 0 / 0 is NaN, x / 1 is x

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each channel stands among all ranks' rows, and this rank's layers among all; int64, copied once."""
        if device not in self._on:
            channels = self._sharded.norm_places() if self._norm else self._sharded.places()
            places = torch.tensor(self._places, dtype=torch.int64)
            self._on[device] = channels.to(device), places.to(device)
        return self._on[device]

    def _gather_tp(self, local: Tensor) -> Tensor:
        size = self._groups.tp.size()
        gathered = local.new_empty(size, *local.shape)
        dist.all_gather(list(gathered.unbind(0)), local.contiguous(), group=self._groups.tp)
        return gathered

    def _assemble(self, gathered: Tensor) -> Tensor:
        """[tp, L_r, n] -> [L_r, nq + nk]; of what several ranks hold the first rank's is taken."""
        rows = gathered.transpose(0, 1).flatten(1)  # [L_r, tp * n]
        return rows[:, self._indices(rows.device)[0]]

    def _share_pp(self, local: Tensor) -> QK:
        """Put this stage's layers in their places of the whole model: [L_r, nq + nk] -> [L, nq], [L, nk]."""
        sizes = self._sharded.layout.num_q_channels, self._sharded.layout.num_k_channels
        whole = torch.zeros(self._num_layers, sum(sizes), dtype=torch.float32, device=local.device)
        if self._places:
            whole[self._indices(whole.device)[1]] = local
        if self._groups.pp.size() > 1:
            dist.all_reduce(whole, group=self._groups.pp)
        return QK(*whole.split(sizes, dim=1))
