"""Packed rows: every response in one row, none cut, and as many rows as the replicas can share."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longact.rl.batches.packing import pack, pack_groups, packed_row


@given(
    lengths=st.lists(st.integers(1, 32), min_size=4, max_size=40),
    max_sequences=st.integers(1, 8),
    replicas=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None)
def test_every_sequence_is_in_one_row_that_holds_it(lengths: list[int], max_sequences: int, replicas: int) -> None:
    lengths = lengths[: len(lengths) // replicas * replicas]
    bins = pack(lengths, capacity=32, max_sequences=max_sequences, multiple_of=replicas)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in members) for members in bins]
    assert max(sizes) <= 32
    assert sizes == sorted(sizes, reverse=True)
    assert max(map(len, bins)) <= max_sequences
    assert len(bins) % replicas == 0


@given(
    groups=st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=9)), min_size=1),
    max_sequences=st.integers(1, 12),
    replicas=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None)
def test_every_response_is_in_one_row_with_its_prompt(
    groups: list[tuple[int, list[int]]], max_sequences: int, replicas: int
) -> None:
    owner = [number for number, (_, lengths) in enumerate(groups) for _ in lengths]
    prompts = [groups[number][0] for number in owner]
    lengths = [length for _, group in groups for length in group]
    indices = [[i for i, number in enumerate(owner) if number == group] for group in range(len(groups))]
    sizes = {"prompts": prompts, "lengths": lengths, "capacity": 32, "max_sequences": max_sequences}
    try:
        bins = pack_groups(indices, **sizes, multiple_of=replicas)
    except ValueError:
        assert len(lengths) % replicas  # as many rows as there are responses, and more, cannot be made
        return

    def tokens(members: list[int]) -> int:
        return sum(groups[number][0] for number in {owner[i] for i in members}) + sum(lengths[i] for i in members)

    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert max(map(tokens, bins)) <= 32
    assert max(map(len, bins)) <= max_sequences
    assert len(bins) % replicas == 0
    for members in bins:  # those of a group are neighbours
        changes = sum(owner[a] != owner[b] for a, b in pairwise(members))
        assert changes == len({owner[i] for i in members}) - 1


def test_rows_of_groups_are_few_and_of_like_size() -> None:
    groups = [list(range(8 * g, 8 * g + 8)) for g in range(6)]
    sizes = {"prompts": [100] * 48, "lengths": [10] * 48, "max_sequences": 48}
    whole = pack_groups(groups, **sizes, capacity=400)
    assert sorted(map(len, whole)) == [16, 16, 16]  # two groups a row, of 360 tokens
    assert [len(row) for row in pack_groups(groups[:1], **sizes, capacity=400, multiple_of=2)] == [4, 4]
    assert sorted(len(row) for row in pack_groups(groups[:1], **sizes, capacity=150)) == [4, 4]
    with pytest.raises(ValueError, match="110 tokens does not fit in a row of 109"):
        pack_groups(groups, **sizes, capacity=109)
    with pytest.raises(ValueError, match="1 sequences cannot be shared by 2 replicas"):
        pack_groups([[0]], **sizes, capacity=400, multiple_of=2)


def test_rows_are_full() -> None:
    assert pack([8, 8, 4, 4, 4, 2, 2], capacity=16, max_sequences=9) == [[0, 1], [2, 3, 4, 5, 6]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens does not fit in a row of 32"):
        pack([3, 33], capacity=32, max_sequences=4)
    with pytest.raises(ValueError, match="1 sequences cannot be shared by 2 replicas"):
        pack([3], capacity=32, max_sequences=4, multiple_of=2)
    with pytest.raises(ValueError, match="6 sequences cannot be shared by 4 replicas"):  # each fills a row
        pack([20] * 6, capacity=32, max_sequences=4, multiple_of=4)


def test_a_row_knows_its_sequences() -> None:
    sequences = [torch.tensor([7, 8, 9]), torch.tensor([4, 5])]
    tokens, positions, real, bounds = packed_row(sequences, length=8, pad_token=1)
    assert tokens.tolist() == [[7, 8, 9, 4, 5, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert real.tolist() == [[True] * 5 + [False] * 3]
    assert bounds.tolist() == [0, 3, 5, 8]
    assert bounds.dtype == torch.int32
    assert packed_row(sequences, length=5, pad_token=1)[3].tolist() == [0, 3, 5]
