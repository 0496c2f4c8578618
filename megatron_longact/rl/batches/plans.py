"""Which responses are trained in which optimizer step, and in which micro-batch of it: layout alone.

Every rank holds the whole rollout batch, so this is a function of (seed, rollout step), and which response is
trained in which step does not depend on the layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from megatron_longact.rl.batches.packing import pack, pack_groups, round_up
from megatron_longact.rl.batches.rollout_batch import RolloutBatch, Row


@dataclass(frozen=True)
class MicroBatchPlan:
    """Which rows a micro-batch holds on this replica, and the longest row on any replica."""

    rows: tuple[Row, ...]
    longest: int
    tokens: int = 0
    """In it and in those of the other replicas: no padding, and a prompt that is shared once."""
    squared_lengths: int = 0
    """Of its sequences and theirs, likewise; behind a shared prompt what a response adds to the prompt's."""


@dataclass(frozen=True)
class StepPlan:
    """All rows of an optimizer step, and this replica's micro-batches of it."""

    rows: tuple[Row, ...]
    micro_batches: tuple[MicroBatchPlan, ...]

    @property
    def tokens(self) -> int:
        """What all replicas compute, padding aside."""
        return sum(part.tokens for part in self.micro_batches)

    @property
    def squared_lengths(self) -> int:
        """What their attention reads, in tokens squared."""
        return sum(part.squared_lengths for part in self.micro_batches)


@dataclass(frozen=True)
class Use:
    """How a rollout batch is gone through, and how far: what a run that goes on with it keeps, whatever its flags."""

    seed: int
    epochs: int
    done: int = 0
    """Responses trained on, counted over all epochs."""


@dataclass(frozen=True)
class Packing:
    """Several responses in one row of a micro-batch."""

    capacity: int
    """Tokens of a row at most."""

    max_sequences: int
    """Responses in a row at most."""

    shares_prompts: bool = False
    """Whether responses to one prompt stand behind one copy of it."""

    sequence_multiple: int = 1
    """What a sequence's tokens are filled up to, if prompts are not shared: context-parallel ranks cut each alike."""


def plan_steps(
    batch: RolloutBatch,
    *,
    seed: int,
    epochs: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    packing: Packing | None = None,
    multiple_of: int = 1,
    done: int = 0,
) -> list[StepPlan]:
    """The optimizer steps on what is left of a rollout batch, with this replica's micro-batches of each.

    Each epoch goes once through the batch in a new random order, `global_batch_size` rows a step.
    Inside a step rows are sorted by length, so that a micro-batch holds little padding, and dealt
    out to the replicas in turn, so that all have the same work and the same shapes. With packing a
    micro-batch is one row of several responses. multiple_of: of the micro-batches of a step on each replica, as an
    interleaved pipeline wants them. done: responses trained on already, over all epochs; what is left of
    an epoch may end in a smaller step, if they were trained on with another `global_batch_size`. Raises ValueError
    where that one does not divide into micro-batches.
    """
    steps: list[StepPlan] = []
    for epoch in range(epochs):
        order = _random_order(len(batch), seed, batch.step, epoch)
        for begin in range(min(max(done - epoch * len(order), 0), len(order)), len(order), global_batch_size):
            rows = sorted(order[begin : begin + global_batch_size], key=batch.total_length)
            if packing is None:
                parts = {"replicas": dp_size, "micro-batches of a virtual pipeline": multiple_of}
                _check_divides(len(rows), global_batch_size, micro_batch_size=micro_batch_size, parts=parts)
                micro_batches = _padded(batch, rows, micro_batch_size, dp_rank, dp_size)
            else:
                micro_batches = _packed(batch, rows, packing, dp_rank, dp_size, multiple_of)
            steps.append(StepPlan(rows=tuple(rows), micro_batches=tuple(micro_batches)))
    return steps


def _check_divides(count: int, global_batch_size: int, *, micro_batch_size: int, parts: dict[str, int]) -> None:
    if count != global_batch_size and count % (micro_batch_size * prod(parts.values())):
        into = " x ".join(f"{number} {name}" for name, number in parts.items() if number > 1 or name == "replicas")
        raise ValueError(
            f"the checkpoint is of the middle of a rollout batch, of which {count} responses are left for an optimizer "
            f"step; they do not divide into --micro-batch-size {micro_batch_size} x {into}: give the "
            "numbers that the batch was begun with, and change them later"
        )


def _padded(
    batch: RolloutBatch, rows: list[Row], micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[MicroBatchPlan]:
    stretch = micro_batch_size * dp_size
    for begin in range(0, len(rows), stretch):
        together = rows[begin : begin + stretch]
        yield MicroBatchPlan(
            rows=tuple(together[dp_rank::dp_size]),
            longest=batch.total_length(together[-1]),
            tokens=sum(map(batch.total_length, together)),
            squared_lengths=sum(batch.total_length(row) ** 2 for row in together),
        )


def _packed(
    batch: RolloutBatch, rows: list[Row], packing: Packing, dp_rank: int, dp_size: int, multiple_of: int
) -> Iterator[MicroBatchPlan]:
    bins = (_bins_of_groups if packing.shares_prompts else _bins)(batch, rows, packing, dp_size * multiple_of)
    for begin in range(0, len(bins), dp_size):  # longest first
        side_by_side = bins[begin : begin + dp_size]
        work = [packed_work(batch, bin, packing) for bin in side_by_side]
        tokens, squares = (sum(parts) for parts in zip(*work, strict=True))
        yield MicroBatchPlan(
            rows=tuple(bins[begin + dp_rank]),
            longest=max(_row_length(batch, bin, packing) for bin in side_by_side),
            tokens=tokens,
            squared_lengths=squares,
        )


def _bins(batch: RolloutBatch, rows: list[Row], packing: Packing, multiple_of: int) -> list[list[Row]]:
    lengths = [round_up(batch.total_length(row), packing.sequence_multiple) for row in rows]
    bins = pack(lengths, capacity=packing.capacity, max_sequences=packing.max_sequences, multiple_of=multiple_of)
    return [[rows[index] for index in bin] for bin in bins]


def _bins_of_groups(batch: RolloutBatch, rows: list[Row], packing: Packing, multiple_of: int) -> list[list[Row]]:
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(batch.prompts[row], []).append(row)
    return pack_groups(
        list(groups.values()),
        prompts=list(map(len, batch.prompts)),
        lengths=batch.lengths.tolist(),
        capacity=packing.capacity,
        max_sequences=packing.max_sequences,
        multiple_of=multiple_of,
    )


def _row_length(batch: RolloutBatch, rows: Sequence[Row], packing: Packing) -> int:
    """Tokens of a packed row, and what fills each sequence up."""
    if packing.shares_prompts:
        return packed_work(batch, rows, packing)[0]
    return sum(round_up(batch.total_length(row), packing.sequence_multiple) for row in rows)


def packed_work(batch: RolloutBatch, rows: Sequence[Row], packing: Packing) -> tuple[int, int]:
    """Tokens of the packed row that these make, and what its attention reads, in tokens squared."""
    lengths = [batch.total_length(row) for row in rows]
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    if packing.shares_prompts:
        times = Counter(batch.prompts[row] for row in rows)
        tokens -= sum((count - 1) * len(prompt) for prompt, count in times.items())
        squares -= sum((count - 1) * len(prompt) ** 2 for prompt, count in times.items())
    return tokens, squares


def _random_order(n: int, *key: int) -> list[Row]:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).permutation(n).tolist()
