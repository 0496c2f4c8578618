"""The reduction over tokens, both ways, and the views of Q and K that it reads at once."""

import json
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longact import saliency
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.saliency import qk_blocks, reduce_by_chunks, reduce_by_norm
from tests import launch

WAYS = {"chunks": reduce_by_chunks, "norm": reduce_by_norm}
"""On a GPU the norm is taken; here both must agree with fp64."""

STATISTICS = ["mean-abs", "rms", "max-abs"]

TOLERANCE = 1e-5
"""fp32 sums of 2,000 terms, in whatever order."""


def naive(x: Tensor, statistic: str) -> Tensor:
    values = x.double().abs()
    return {"mean-abs": values.sum(0), "rms": values.square().sum(0), "max-abs": values.amax(0)}[statistic]


@pytest.fixture(params=[2**24, 4096], ids=["all in the cache", "a small cache"])
def cached_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "_CACHED_BYTES", request.param)


@pytest.mark.usefixtures("cached_bytes")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 2000])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("way", WAYS)
def test_reduction_is_the_naive_one(way: str, statistic: Any, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    fused = torch.randn(tokens, 2 * 12, generator=generator).to(dtype)
    x = fused.unflatten(1, (2, 12))[..., :10]  # strided, as Q and K lie in the output of linear_qkv
    keep = torch.rand(tokens, generator=generator) < 0.7
    keep[0] = True
    noisy = torch.where(keep[:, None, None], x, float("nan"))
    for given, counted, wanted in ((x, None, x), (noisy, keep, x[keep])):
        found = WAYS[way](given, counted, statistic=statistic)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), naive(wanted, statistic), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("way", WAYS)
def test_no_token_is_zero_and_bad_ones_show(way: str, statistic: Any) -> None:
    x = torch.full((9, 3), float("nan"), dtype=torch.bfloat16)
    assert WAYS[way](x, torch.zeros(9, dtype=torch.bool), statistic=statistic).tolist() == [0.0, 0.0, 0.0]
    for bad in (float("nan"), float("inf")):
        for counted in (None, torch.arange(9) != 2):
            x = torch.ones(9, 3)
            x[4, 1] = bad
            assert WAYS[way](x, counted, statistic=statistic).isfinite().tolist() == [True, False, True]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made, views of `given` apart."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.num_bytes, self._given = 0, given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self._given:
            self.num_bytes = max(self.num_bytes, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_norm_copies_no_more_than_an_eighth(statistic: Any, masked: bool) -> None:
    x = torch.randn(4096, 64)  # fp32: a CPU casts a copy of 16-bit values first
    counted = torch.ones(4096, dtype=torch.bool) if masked else None
    reduce_by_norm(x, counted, statistic=statistic)
    with Largest(x) as largest:
        reduce_by_norm(x, counted, statistic=statistic)
    share = largest.num_bytes / (x.numel() * x.element_size())
    assert share <= 1 / 8 if masked else share < 1 / 100


LAYOUTS = {
    "Qwen3-8B": (32, 8, 128, False),
    "as many groups as heads": (4, 4, 8, False),
    "with an output gate": (8, 2, 4, True),
    "gate, as many groups as heads": (4, 4, 4, True),
    "one group": (6, 1, 8, False),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_cover_the_ranges_and_nothing_else(name: str, tp: int) -> None:
    heads, groups, hn, gate = LAYOUTS[name]
    layout = QKVLayout(num_attention_heads=heads, num_query_groups=groups, kv_channels=hn, attention_output_gate=gate)
    if layout.num_rows % tp:
        pytest.skip("these rows do not divide")
    for rank in range(tp):
        ranges = layout.local_qk_ranges(rank, tp)
        blocks = qk_blocks(ranges)
        rows = torch.arange(layout.rows_per_partition(tp))
        covered = torch.cat([block.of(rows).flatten() for block in blocks]) if blocks else rows[:0]
        assert sorted(covered.tolist()) == [row for start, end in ranges for row in range(start, end)]


def test_q_and_k_of_all_groups_are_read_at_once() -> None:
    layout = QKVLayout(num_attention_heads=32, num_query_groups=8, kv_channels=128, attention_output_gate=False)
    assert [len(qk_blocks(layout.local_qk_ranges(0, tp))) for tp in (1, 2, 8)] == [1, 1, 1]


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT RUN: triton is missing; it comes with torch's CUDA build")
def test_the_triton_kernel_agrees_too() -> None:
    environment = {**launch.QUIET, "TRITON_INTERPRET": "1", "PYTHONPATH": str(launch.ROOT)}
    done = launch.run([sys.executable, "tests/programs/reduce_by_triton.py"], timeout=60, environment=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said["errors"]) == 36
    assert max(said["errors"].values()) < TOLERANCE
    assert set(map(tuple, said["finite"].values())) == {(True, True, True, False, True, False, True, True)}
