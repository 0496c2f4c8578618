"""Which rows of which weights of an attention layer make channels of Q and K, and who holds them. Pure.

A layout says it of a whole layer, `ShardedLayout` of what each tensor-parallel rank holds of it. Channels are numbered
head by head, section by section, those of Q first, then those of K.

Shape letters: nq and nk channels of Q and of K, n rows of a tensor-parallel rank, all projections one behind the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

NO_CHANNEL = -1
"""Of a row that makes no channel of Q or K."""


@dataclass(frozen=True)
class Section:
    """Channels of Q, or of K, that are ranked with each other: heads of one width, or a run that all heads share."""

    name: str
    heads: int
    width: int
    rope: int | None = 0
    """From which channel of a head on RoPE turns them; None: it does not."""

    @property
    def channels(self) -> int:
        """Of all its heads."""
        return self.heads * self.width


@dataclass(frozen=True, eq=False)
class Projection:
    """A weight, and which channel each of its rows makes."""

    name: str
    """Of its module in Megatron's attention, or of its tensor in Hugging Face's."""
    channels: Tensor
    """int64 [rows]; `NO_CHANNEL` for rows of V, of a gate, of a latent."""
    stretches: tuple[int, ...] = ()
    """Rows that tensor parallelism cuts one by one; (): all of them together."""
    replicable: bool = False
    """Whether every tensor-parallel rank may hold all of it."""

    def shard(self, tp_rank: int, tp_size: int) -> Tensor:
        """What `tp_rank` holds of `channels`: the same chunk of each stretch."""
        stretches = self.channels.split(self.stretches or [len(self.channels)])
        if bad := [len(stretch) for stretch in stretches if len(stretch) % tp_size]:
            raise ValueError(f"{bad[0]} rows of {self.name} do not divide by tensor parallel size {tp_size}")
        return torch.cat([stretch.chunk(tp_size)[tp_rank] for stretch in stretches])


class AttentionLayout(ABC):
    """What the parts of LongAct ask of an attention layer, whatever kind it is; frozen dataclasses implement it."""

    norms: ClassVar[tuple[str, ...]] = ()
    """Modules of Megatron's attention that put out Q, and K, after their q/k-layernorm; (): there are none."""
    has_biases: ClassVar[bool] = True
    """Whether Megatron gives the projections the biases that the configuration asks for."""
    rope_interleaved: ClassVar[bool] = False
    """Whether RoPE turns neighbouring channels as a pair, whatever the configuration says."""

    @property
    @abstractmethod
    def q_sections(self) -> tuple[Section, ...]:
        """Of Q's channels, in their order."""

    @property
    @abstractmethod
    def k_sections(self) -> tuple[Section, ...]:
        """Of K's."""

    @property
    @abstractmethod
    def projections(self) -> tuple[Projection, ...]:
        """Those of Megatron's attention module that make channels of Q or K."""

    @property
    @abstractmethod
    def hf_projections(self) -> tuple[Projection, ...]:
        """The same rows in Hugging Face's checkpoints."""

    @property
    def hf_mapped(self) -> bool:
        """Whether `hf_projections` are those of the model's checkpoints."""
        return True

    def norm_channels(self, tp_rank: int, tp_size: int) -> list[Tensor]:
        """The channels that each of `norms` puts out on a rank: int64 [channels]."""
        return []

    def saved(self) -> dict[str, Any]:
        """What a checkpoint remembers of it; `layouts.layout_from_saved` is the way back."""
        return asdict(self)  # type: ignore[call-overload]

    @property
    def sections(self) -> tuple[Section, ...]:
        """Of Q's channels, then of K's."""
        return self.q_sections + self.k_sections

    def by_section(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """Values of channels, Q [..., nq] and K [..., nk], section by section."""
        parts = torch.cat([q, k], dim=-1).split([section.channels for section in self.sections], dim=-1)
        return {section.name: part for section, part in zip(self.sections, parts, strict=True)}

    @property
    def num_q_channels(self) -> int:
        """Channels of Q: nq."""
        return sum(section.channels for section in self.q_sections)

    @property
    def num_k_channels(self) -> int:
        """Channels of K: nk."""
        return sum(section.channels for section in self.k_sections)


@dataclass(frozen=True)
class ShardedLayout:
    """A layout as tensor-parallel ranks hold it."""

    layout: AttentionLayout
    tp_size: int = 1
    whole: frozenset[str] = frozenset()
    """Projections that every rank holds all of."""
    sequence_parallel: bool = False
    """Whether each rank runs those over its own part of the sequence."""

    @cached_property
    def columns(self) -> Mapping[str, slice]:
        """Where the rows of each projection stand among the n of a rank."""
        found, start = {}, 0
        for projection in self.layout.projections:
            rows = len(self.shard(projection, 0))
            found[projection.name] = slice(start, start + rows)
            start += rows
        return found

    @cached_property
    def num_rows(self) -> int:
        """Rows of a rank: n."""
        return max(columns.stop for columns in self.columns.values())

    def shard(self, projection: Projection, tp_rank: int) -> Tensor:
        """The channels that a rank's rows of one projection make: int64 [rows]."""
        return projection.channels if projection.name in self.whole else projection.shard(tp_rank, self.tp_size)

    def qk_ranges(self, projection: Projection, tp_rank: int) -> list[tuple[int, int]]:
        """A rank's rows of one projection that make channels, as `runs`."""
        return runs(self.shard(projection, tp_rank) != NO_CHANNEL)

    def channels(self, tp_rank: int) -> Tensor:
        """The channel that each row of a rank makes, or `NO_CHANNEL`: int64 [n]."""
        return torch.cat([self.shard(projection, tp_rank) for projection in self.layout.projections])

    def places(self) -> Tensor:
        """Where each channel stands when the rows of all ranks are one behind the other: int64 [nq + nk]."""
        return self._places([self.channels(rank) for rank in range(self.tp_size)])

    def norm_places(self) -> Tensor:
        """`places`, when what `norms` put out stands one behind the other."""
        every = [torch.cat(self.layout.norm_channels(rank, self.tp_size)) for rank in range(self.tp_size)]
        return self._places(every)

    def _places(self, channels: list[Tensor]) -> Tensor:
        """Of a channel that several ranks hold the first is taken."""
        every = torch.cat(channels)
        held = (every != NO_CHANNEL).nonzero().flatten()
        places = torch.full((self.layout.num_q_channels + self.layout.num_k_channels,), len(every))
        return places.scatter_reduce(0, every[held], held, "amin")

    @property
    def partial(self) -> list[slice]:
        """Columns that saw only a part of the tokens on each rank."""
        return [self.columns[name] for name in self.whole] if self.sequence_parallel else []


def runs(rows: Tensor) -> list[tuple[int, int]]:
    """Where a bool [rows] is True, as [start, end) ranges, ascending, none touching the next."""
    edges = torch.diff(rows.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, ends = ((edges == step).nonzero().flatten().tolist() for step in (1, -1))
    return list(zip(starts, ends, strict=True))
