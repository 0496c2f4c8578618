"""Rows under context parallelism: which of its tokens a rank holds, and keys and values of all of them put together.

Each sequence of a row is cut in zigzag, as Megatron and Transformer Engine cut it (`tokens.zigzag_positions`): a padded
row is one sequence, a packed row is several, a row with shared prompts is one again.
Shape letters: t tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longact.megatron.attention_plan import Span
from megatron_longact.tokens import zigzag_positions


class RowShare:
    """How a row of sequences between `bounds`, the last of which is t, is shared by a context-parallel group."""

    def __init__(self, bounds: Sequence[int], group: ProcessGroup) -> None:
        self._bounds, self._group = torch.tensor(bounds), group
        self._order: Tensor | None = None
        """Where each token of the row stands among those of all ranks: int64 [t], on the device of what is gathered."""

    @cached_property
    def positions(self) -> Tensor:
        """The tokens of the row that this rank holds, in its order: int64 [t / cp]."""
        return self._positions_of(self._group.rank())

    @property
    def spans(self) -> list[Span]:
        """The same as spans."""
        breaks = (self.positions.diff() != 1).nonzero().flatten() + 1
        parts = self.positions.tensor_split(breaks)
        return [(int(part[0]), int(part[-1]) + 1) for part in parts]

    def whole(self, x: Tensor) -> Tensor:
        """[t / cp, ...] of each rank -> [t, ...] in the row's order; the backward adds up what all ranks give."""
        gathered = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self._group)
        if self._order is None:
            ranks = range(self._group.size())
            self._order = torch.cat([self._positions_of(rank) for rank in ranks]).argsort().to(x.device)
        return gathered.index_select(0, self._order)

    def _positions_of(self, rank: int) -> Tensor:
        total = int(self._bounds[-1])
        return zigzag_positions(self._bounds, total, cp_rank=rank, cp_size=self._group.size())
