"""The cut of flat shards at row boundaries: exactly the frozen elements, and no other."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_longact import LongActConfig
from megatron_longact.masked_update import RowIndex, Shard, StrictFreeze, frozen_parts, gradient_squares, mask_gradients

SHARDS = st.tuples(st.integers(1, 7), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]),
        st.lists(st.integers(0, shape[0] * shape[1]), min_size=2, max_size=2).map(sorted),
    )
)


@given(SHARDS)
def test_frozen_parts_are_exactly_the_frozen_elements(
    case: tuple[tuple[int, int], list[bool], list[int]],
) -> None:
    (rows, width), frozen, (start, end) = case
    flat = torch.arange(rows * width)[start:end].clone()
    index = RowIndex(torch.tensor(frozen).nonzero().flatten(), flat.device)
    found = [
        value for view, where in frozen_parts(flat, start, width, index) for value in view[where].flatten().tolist()
    ]
    assert sorted(found) == [element for element in range(start, end) if frozen[element // width]]


@given(SHARDS)
def test_strict_freeze_restores_frozen_elements_and_no_other(
    case: tuple[tuple[int, int], list[bool], list[int]],
) -> None:
    (rows, width), frozen, (start, end) = case
    parameter = nn.Parameter(torch.zeros(rows, width))
    master = torch.rand(end - start)
    before = master.clone()
    shard = Shard(parameter, start, end, lambda: [master], master)
    freeze = StrictFreeze([shard], torch.optim.SGD([parameter]), LongActConfig())
    index = {parameter: RowIndex(torch.tensor(frozen).nonzero().flatten(), master.device)}
    freeze.before_step(index)
    master += 1
    freeze.after_step(index)
    expected = [frozen[element // width] for element in range(start, end)]
    assert (master == before).tolist() == expected


def test_gradients_of_frozen_rows_are_zeroed_and_measured() -> None:
    parameter = nn.Parameter(torch.zeros(4, 3))
    parameter.main_grad = torch.arange(12.0).view(4, 3)
    frozen = {parameter: RowIndex(torch.tensor([1, 3]), parameter.device)}
    every = {parameter: RowIndex(torch.arange(4), parameter.device)}
    shard = Shard(parameter, 2, 11, lambda: [], parameter)
    squares = gradient_squares([shard], [frozen, every], parameter.device)
    assert squares.tolist() == [9 + 16 + 25 + 81 + 100, sum(n * n for n in range(2, 11))]
    mask_gradients(frozen)
    assert parameter.main_grad.tolist() == [[0, 1, 2], [0, 0, 0], [6, 7, 8], [0, 0, 0]]
