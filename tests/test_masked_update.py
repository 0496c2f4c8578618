"""The cut of flat shards at row boundaries: exactly the frozen elements, and no other."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_longact import LongActConfig
from megatron_longact.masked_update import RowIndex, Shard, StrictFreeze, frozen_parts, gradient_squares, mask_gradients
from megatron_longact.optimizer_shards import _copies

SHARDS = st.tuples(st.integers(1, 7), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]),
        st.lists(st.integers(0, shape[0] * shape[1]), min_size=2, max_size=2).map(sorted),
    )
)


@settings(deadline=None)  # other work on the machine is no fault
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


@settings(deadline=None)  # other work on the machine is no fault
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


def test_rows_are_copied_once_to_each_device_that_is_cut() -> None:
    index = RowIndex(torch.tensor([1, 3, 6]), torch.device("meta"))
    assert index.within(2, 4, torch.device("cpu")).tolist() == [1]
    assert index.within(2, 4, torch.device("meta")).is_meta
    assert index.on(torch.device("meta")) is index.device
    other = RowIndex(torch.tensor([1]), torch.device("cpu"))
    assert other.on(torch.device("meta")) is other.on(torch.device("meta"))


ROWS, WIDTH = 8, 4
ON_GPU, ON_HOST = torch.device("cuda", 0), torch.device("cpu")


class Stream:
    """A stream, an event or the block of one on a GPU that is not there: everything has happened already."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_masters_of_an_offloaded_optimizer_are_frozen_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own class over two fake parameters on a GPU; one of them is stepped on the host."""
    for name in ("current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Stream())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return FakeTensor(mode, torch.empty(shape, device="meta", dtype=dtype), ON_GPU)

    saved: list[list[torch.device]] = []
    rows = torch.tensor([0, 2, 5])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parameters = [nn.Parameter(on_gpu(ROWS, WIDTH)) for _ in range(2)]
        keys = [nn.Parameter(on_gpu(ROWS * WIDTH - 6, dtype=torch.bfloat16)) for _ in parameters]
        inner = HybridDeviceOptimizer(
            [{"params": keys}],
            offload_fraction=0.5,
            cpu_optimizer_cls=torch.optim.AdamW,
            gpu_optimizer_cls=torch.optim.AdamW,
            param_update_in_fp32=True,
            overlap_cpu_optimizer_d2h_h2d=False,
            lr=1e-3,
        )
        shards = [
            Shard(parameter, 3, ROWS * WIDTH - 3, _copies(inner, key), key)
            for parameter, key in zip(parameters, keys, strict=True)
        ]
        frozen = {parameter: RowIndex(rows, ON_GPU) for parameter in parameters}
        freeze = StrictFreeze(shards, inner, LongActConfig())
        inner.register_step_pre_hook(lambda *_: freeze.before_step(frozen))
        inner.register_step_pre_hook(lambda *_: saved.append([values.device for *_, values in freeze._saved]))
        inner.register_step_post_hook(lambda *_: freeze.after_step(frozen))
        for _ in range(2):
            for parameter, key in zip(parameters, keys, strict=True):
                parameter.main_grad = on_gpu(ROWS, WIDTH)
                key.grad = on_gpu(key.numel(), dtype=torch.bfloat16)
            gradient_squares(shards, [frozen], ON_GPU)
            mask_gradients(frozen)
            inner.step()
        masters = [[master.device for master in shard.masters()] for shard in shards]
    assert masters == [[ON_GPU, ON_HOST], [ON_GPU, ON_GPU]]
    parts = 2 * [ON_GPU] + 2 * [ON_HOST] + 4 * [ON_GPU]  # of each tensor: the end of a row, and whole rows
    assert saved == [parts, parts]
    assert {device for index in frozen.values() for device in index._on} == {ON_GPU, ON_HOST}
