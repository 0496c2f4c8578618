"""Which keys the queries of a row see, as pieces that any attention for sequences of different length can take.

Pure: no Megatron. A piece is causal from the bottom right: its last query belongs to its last key, the one before it
to the key before. A packed sequence is one piece; a response beside its prompt is one whose keys begin with the
prompt's; what a context-parallel rank holds of a row is more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Span = tuple[int, int]
"""Tokens of a row: the first, and the one behind the last."""


@dataclass(frozen=True)
class Piece:
    """A span of queries, and the spans of what the last of them sees, in the order of their positions."""

    queries: Span
    keys: tuple[Span, ...]

    @property
    def num_queries(self) -> int:
        """How many queries it has."""
        return length(self.queries)

    @property
    def num_keys(self) -> int:
        """How many keys its last query sees."""
        return sum(map(length, self.keys))

    def until(self, query: int) -> tuple[Span, ...]:
        """The keys that the query before `query` sees."""
        return _without_last(self.keys, self.queries[1] - query)


@dataclass(frozen=True)
class AttentionPlan:
    """The pieces of a row, in the order of their queries, which they cover from 0 on without a gap."""

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        ends = [0, *(piece.queries[1] for piece in self.pieces)]
        assert [piece.queries for piece in self.pieces] == list(pairwise(ends))

    @property
    def num_queries(self) -> int:
        """Tokens of the row."""
        return self.pieces[-1].queries[1]

    @cached_property
    def key_index(self) -> Tensor:
        """The keys of all pieces, one piece behind the other: int64 [their sum]."""
        return indices([span for piece in self.pieces for span in piece.keys])

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where pieces begin and end among the queries, and in `key_index`: int32 [pieces + 1] each."""
        ends = [accumulate(sizes, initial=0) for sizes in zip(*self._sizes, strict=True)]
        queries, keys = (torch.tensor(list(end), dtype=torch.int32) for end in ends)
        return queries, keys

    @property
    def longest(self) -> tuple[int, int]:
        """Queries and keys of a piece at most."""
        queries, keys = map(max, zip(*self._sizes, strict=True))
        return queries, keys

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        return [(piece.num_queries, piece.num_keys) for piece in self.pieces]

    def of(self, spans: Sequence[Span]) -> AttentionPlan:
        """The plan of a rank that holds the queries of these spans, in this order, and can read all keys of the row."""
        return AttentionPlan(tuple(self._cut(spans)))

    def _cut(self, spans: Sequence[Span]) -> Iterator[Piece]:
        place = 0
        for first, last in spans:
            for piece in self.pieces:
                begin, end = max(first, piece.queries[0]), min(last, piece.queries[1])
                if begin < end:
                    yield Piece((place, place + end - begin), piece.until(end))
                    place += end - begin


def of_sequences(bounds: Sequence[int]) -> AttentionPlan:
    """The plan of sequences one behind the other, from `bounds[0]` 0 on; empty ones are left out."""
    spans = [span for span in pairwise(bounds) if length(span)]
    return AttentionPlan(tuple(Piece(span, (span,)) for span in spans))


def length(span: Span) -> int:
    """Tokens of a span."""
    return span[1] - span[0]


def indices(spans: Sequence[Span]) -> Tensor:
    """The tokens of spans, one behind the other: int64 [their sum]."""
    return torch.cat([torch.arange(*span) for span in spans])


def _without_last(spans: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    (begin, end), before = spans[-1], spans[:-1]
    if end - begin > count:
        return (*before, (begin, end - count))
    return _without_last(before, count - (end - begin))
