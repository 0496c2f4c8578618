"""Which tokens count, and the reduction over them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_longact.tokens import TokenRules, counted_tokens, not_padding, zigzag


def counted(
    named: Tensor | None = None,
    *,
    packed: Any = None,
    padding: Tensor | None = None,
    cp: tuple[int, int] = (0, 1),
    **rules: int,
) -> Tensor | None:
    return counted_tokens(
        rules=TokenRules(**rules),
        named=named,
        packed_seq_params=packed,
        padding_mask=padding,
        cp_rank=cp[0],
        cp_size=cp[1],
    )


def thd(*lengths: int, padded: tuple[int, ...] | None = None) -> PackedSeqParams:
    def bounds(sizes: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds(lengths),
        cu_seqlens_kv=bounds(lengths),
        cu_seqlens_q_padded=bounds(padded) if padded else None,
        max_seqlen_q=max(lengths),
    )


NAMED = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()


def test_named_tokens_come_first() -> None:
    result = counted(NAMED, padding=torch.zeros(2, 6).bool())
    assert result is not None
    assert torch.equal(result.T, NAMED)


def test_min_context_and_skipping_count_named_tokens_only() -> None:
    assert counted(NAMED, min_context=3).T.int().tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6]
    assert counted(NAMED, skip_first_tokens=1).T.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]


def test_padding_mask_is_true_at_padding() -> None:
    assert torch.equal(counted(padding=~NAMED).T, NAMED)
    assert counted(padding=~NAMED, min_context=3).T.int().tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6]


def test_nothing_told_counts_all_and_cannot_know_sequences() -> None:
    assert counted() is None
    for rules in ({"min_context": 2}, {"skip_first_tokens": 1}):
        with pytest.raises(ValueError, match="need to know the sequences"):
            counted(**rules)
    with pytest.raises(ValueError, match="need to know the sequences"):
        counted(padding=~NAMED, cp=(0, 2), min_context=2)  # its lengths are those of a part


def test_packed_sequences() -> None:
    assert counted(packed=thd(3, 2)).flatten().int().tolist() == [1] * 5
    assert counted(packed=thd(3, 2), min_context=3).flatten().int().tolist() == [1, 1, 1, 0, 0]
    assert counted(packed=thd(3, 2), skip_first_tokens=2).flatten().int().tolist() == [0, 0, 1, 0, 0]
    assert counted(packed=thd(3, 2, padded=(4, 4))).flatten().int().tolist() == [1, 1, 1, 0, 1, 1, 0, 0]
    behind = torch.ones(1, 7).bool()
    assert counted(behind, packed=thd(3, 2)).flatten().int().tolist() == [1] * 5 + [0] * 2


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([2, 4]), st.integers(0, 3))
def test_context_parallel_parts_put_together_count_the_same(lengths: list[int], cp_size: int, skip: int) -> None:
    sizes = tuple(length * 2 * cp_size for length in lengths)
    whole = counted(packed=thd(*sizes), skip_first_tokens=skip, min_context=sizes[0])
    parts = [
        counted(packed=thd(*sizes), skip_first_tokens=skip, min_context=sizes[0], cp=(rank, cp_size))
        for rank in range(cp_size)
    ]
    assert sum(int(part.sum()) for part in parts) == int(whole.sum())
    assert all(part.shape[0] == whole.shape[0] // cp_size for part in parts)


def test_zigzag_takes_a_chunk_from_either_end() -> None:
    assert zigzag(torch.arange(8)[None], cp_rank=1, cp_size=2).tolist() == [[2, 3, 4, 5]]
    with pytest.raises(ValueError, match="does not divide"):
        zigzag(torch.arange(6)[None], cp_rank=0, cp_size=2)


def test_weights_go_through_all_rules() -> None:
    often = NAMED * torch.tensor([3.0, 1, 1, 2, 9, 9])
    assert counted(often).T.tolist() == often.tolist()
    assert counted(often, skip_first_tokens=1).T.tolist() == [[0, 1, 1, 2, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert counted(often, min_context=3).T.tolist() == [[3, 1, 1, 2, 0, 0], [0] * 6]
    row = torch.tensor([[2.0, 0, 5, 1, 1, 7]])
    assert counted(row, packed=thd(3, 2)).flatten().tolist() == [2, 0, 5, 1, 1, 0]


def test_a_packed_row_may_be_longer_than_its_bounds_and_its_mask() -> None:
    row = {"rules": TokenRules(), "packed_seq_params": thd(3, 2), "padding_mask": None, "cp_rank": 0, "cp_size": 1}
    assert counted_tokens(named=None, total=8, **row).flatten().tolist() == [True] * 5 + [False] * 3
    named = torch.tensor([[True, False, True, True, True]])
    assert counted_tokens(named=named, total=7, **row).flatten().int().tolist() == [1, 0, 1, 1, 1, 0, 0]


def test_padding_is_a_run_of_one_id_at_either_end() -> None:
    rows = [[5, 6, 7, 0, 0, 0], [0, 0, 5, 6, 7, 8], [9, 9, 5, 6, 0, 0], [5, 6, 7, 8, 9, 5], [0, 0, 0, 0, 0, 0]]
    assert [int(not_padding(torch.tensor([row]))) for row in rows] == [3, 4, 2, 6, 0]
    assert int(not_padding(torch.tensor(rows))) == 15
