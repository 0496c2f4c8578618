"""How activations are reduced over tokens: a statistic, the sums of one pass, and the views that are read. No Megatron.

Shape letters: t tokens, n accumulated channels of this rank, L layers of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_longact.config import Statistic as StatisticName

CHUNKS = 8
"""On a CPU, temporaries of a reduction hold at most this fraction of the tokens."""


@dataclass(frozen=True)
class Statistic:
    """The mean over tokens, or the maximum, of |x| to a power; its root is a channel's saliency."""

    label: str
    """In a picture."""
    power: int = 1
    """1 or 2."""
    maximum: bool = False
    """Of the tokens, instead of their mean."""

    @property
    def reduce_op(self) -> dist.ReduceOp.RedOpType:
        """How the sums of several ranks become one."""
        return dist.ReduceOp.MAX if self.maximum else dist.ReduceOp.SUM

    def reduce(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Reduce over tokens, reading x once: x [t, ...] -> fp32 [...].

        weights: [t], how often each token counts: bool, or fp32 of 0 and more; None: all count once. What tokens of
        weight 0 hold, NaN included, does not matter; a NaN or Inf that counts stays no finite number. A maximum only
        asks whether a token counts. The order of the sum differs between devices, and with it the last bits.
        """
        if x.is_cuda:
            from megatron_longact.reduction_triton import reduce

            return reduce(x, weights, power=self.power, maximum=self.maximum)
        total = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
        rows = max(-(-x.shape[0] // CHUNKS), 1)
        for start in range(0, x.shape[0], rows):
            tokens = slice(start, start + rows)
            self.combine(total, self._of_part(x[tokens], None if weights is None else weights[tokens]))
        return total

    def _of_part(self, x: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            weights = weights.view(-1, *(1,) * (x.dim() - 1))
            x = torch.where(weights > 0, x, 0)
        if self.maximum:
            # gloo's maximum over ranks drops NaN
            return x.abs().amax(0).float().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        if weights is None or weights.dtype == torch.bool:
            return x.abs().sum(0, dtype=torch.float32) if self.power == 1 else x.float().square().sum(0)
        terms = x.float().abs() if self.power == 1 else x.float().square()
        return terms.mul_(weights).sum(0)

    def combine(self, into: Tensor, value: Tensor) -> None:
        """Add what more tokens gave to what earlier ones gave, in place; NaN propagates."""
        if self.maximum:
            torch.maximum(into, value, out=into)
        else:
            into += value

    def over_ranks(self, values: Tensor) -> Tensor:
        """What ranks that saw other tokens have together: [ranks, ...] -> [...]."""
        return values.amax(0) if self.maximum else values.sum(0)

    def finish(self, sums: Tensor, tokens: Tensor) -> Tensor:
        """The saliency: sums and the number of tokens, shapes that broadcast; NaN if no token counted."""
        if self.maximum:
            return torch.where(tokens > 0, sums, torch.nan)
        mean = sums / tokens
        return mean.sqrt() if self.power == 2 else mean


STATISTICS: dict[StatisticName, Statistic] = {
    "mean-abs": Statistic("mean |activation|"),
    "rms": Statistic("rms activation", power=2),
    "max-abs": Statistic("max |activation|", maximum=True),
}
"""By the name that `--longact-statistic` takes."""


class Accumulator:
    """fp32 sums of one pass for all layers of this rank: `sums` [L, n + 1], the last column counts tokens."""

    def __init__(self, num_layers: int, num_channels: int, *, statistic: Statistic, device: torch.device) -> None:
        self.statistic = statistic
        self.sums = torch.zeros(num_layers, num_channels + 1, dtype=torch.float32, device=device)

    def add(self, into: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """Add activations x [t, ...]; into: a view of `sums` that is shaped as the channels of x; weights: [t]."""
        self.statistic.combine(into, self.statistic.reduce(x.detach(), weights))

    def count(self, layers: slice, num_tokens: Tensor | int) -> None:
        """Count the tokens of a forward through these layers: the sum of their weights."""
        self.sums[layers, -1].add_(num_tokens)

    def reset(self) -> None:
        """Begin a new pass."""
        self.sums.zero_()


class Block(NamedTuple):
    """Equal runs of channels at equal distances, such as Q and K of all groups, which one kernel can read."""

    start: int
    runs: int
    period: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The channels as a view: [..., n] -> [..., runs, width]."""
        length = (self.runs - 1) * self.period + self.width
        return x.narrow(-1, self.start, length).unfold(-1, self.width, self.period)


def qk_blocks(ranges: Sequence[tuple[int, int]]) -> list[Block]:
    """Put together the [start, end) ranges of one width if they lie at equal distances."""
    by_width: dict[int, list[int]] = {}
    for start, end in ranges:
        by_width.setdefault(end - start, []).append(start)
    blocks = []
    for width, starts in by_width.items():
        periods = {b - a for a, b in pairwise(starts)} or {width}
        if len(periods) == 1:
            blocks.append(Block(starts[0], len(starts), periods.pop(), width))
        else:
            blocks += [Block(start, 1, width, width) for start in starts]
    return blocks
