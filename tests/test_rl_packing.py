"""Packed rows: every response in one row, none cut, and as many rows as the replicas can share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longact.rl.batches.packing import pack, packed_row


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


def test_rows_are_full() -> None:
    assert pack([8, 8, 4, 4, 4, 2, 2], capacity=16, max_sequences=9) == [[0, 1], [2, 3, 4, 5, 6]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens does not fit in a row of 32"):
        pack([3, 33], capacity=32, max_sequences=4)
    with pytest.raises(ValueError, match="1 sequences cannot be shared by 2 replicas"):
        pack([3], capacity=32, max_sequences=4, multiple_of=2)


def test_a_row_knows_its_sequences() -> None:
    sequences = [torch.tensor([7, 8, 9]), torch.tensor([4, 5])]
    tokens, positions, real, bounds = packed_row(sequences, length=8, pad_token=1)
    assert tokens.tolist() == [[7, 8, 9, 4, 5, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert real.tolist() == [[True] * 5 + [False] * 3]
    assert bounds.tolist() == [0, 3, 5, 8]
    assert bounds.dtype == torch.int32
    assert packed_row(sequences, length=5, pad_token=1)[3].tolist() == [0, 3, 5]
