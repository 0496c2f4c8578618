"""The reduction over tokens, on a CPU and, in Triton's interpreter, as on a GPU; and what a GPU launches for it."""

import itertools
import json
import re
import sys
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longact.config import LongActConfig
from megatron_longact.config import Statistic as StatisticName
from megatron_longact.planning import cost
from megatron_longact.planning.run_shape import Attention, Batch, Parallel
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.reduction import CHUNKS, STATISTICS, Accumulator, qk_blocks
from tests import launch

TOLERANCE = 1e-5
"""fp32 sums of 2,000 terms, in whatever order."""

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="NOT RUN: triton is missing; it comes with torch's CUDA build"
)


def test_a_statistic_is_a_line_of_the_table_and_its_name_among_the_flags() -> None:
    assert tuple(STATISTICS) == get_args(StatisticName)
    assert len({statistic.label for statistic in STATISTICS.values()}) == len(STATISTICS)


def naive(x: Tensor, weights: Tensor | None, statistic: str) -> Tensor:
    """Tokens that do not count are not looked at; those that count n times stand there n times."""
    if weights is not None:
        x, weights = x[weights > 0], weights[weights > 0].double()[:, None, None]
    values = x.double().abs()
    if statistic == "max-abs":
        return values.amax(0)
    terms = values.square() if statistic == "rms" else values
    return (terms if weights is None else terms * weights).sum(0)


def strided(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[tokens, 2, 10], as Q and K lie in the output of linear_qkv."""
    return torch.randn(tokens, 2 * 12, generator=generator).to(dtype).unflatten(1, (2, 12))[..., :10]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_reduction_is_the_naive_one(statistic: Any) -> None:
    for tokens, dtype in itertools.product((1, 7, 2000), (torch.bfloat16, torch.float16, torch.float32)):
        generator = torch.Generator().manual_seed(tokens)
        x = strided(tokens, dtype, generator)
        keep = torch.rand(tokens, generator=generator) < 0.7
        keep[0] = True
        often = keep * torch.randint(1, 9, (tokens,), generator=generator)
        noisy = torch.where(keep[:, None, None], x, float("nan"))
        for given, weights in ((x, None), (noisy, keep), (noisy, often.float())):
            found = STATISTICS[statistic].reduce(given, weights)
            assert found.dtype == torch.float32
            case = f"{tokens} {dtype} {None if weights is None else weights.dtype}: "
            wanted = naive(given, weights, statistic)
            torch.testing.assert_close(
                found.double(), wanted, rtol=TOLERANCE, atol=0, msg=lambda said, case=case: case + said
            )


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_token_is_zero_and_bad_ones_show(statistic: Any) -> None:
    reduce = STATISTICS[statistic].reduce
    x = torch.full((9, 3), float("nan"), dtype=torch.bfloat16)
    assert reduce(x, torch.zeros(9, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]
    for bad in (float("nan"), float("inf")):
        for weights in (None, torch.arange(9) != 2, (torch.arange(9) != 2) * 2.0):
            x = torch.ones(9, 3)
            x[4, 1] = bad
            assert reduce(x, weights).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_token_at_all_is_no_saliency(statistic: Any) -> None:
    sums = Accumulator(2, 3, statistic=STATISTICS[statistic], device=torch.device("cpu"))
    sums.count(slice(1, 2), 5)
    found = STATISTICS[statistic].finish(sums.sums[:, :-1], sums.sums[:, -1:])
    assert found.isfinite().all(1).tolist() == [False, True]


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
def test_a_cpu_copies_no_more_than_an_eighth_at_a_time(statistic: Any) -> None:
    x = torch.randn(4096, 64)
    for weights in (None, torch.ones(4096, dtype=torch.bool), torch.ones(4096)):
        with Largest(x) as largest:
            STATISTICS[statistic].reduce(x, weights)
        assert largest.num_bytes <= x.numel() * x.element_size() / CHUNKS


# -- the views of Q and K ------------------------------------------------------------------------------

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


# -- on a GPU --------------------------------------------------------------------------------------------


@needs_triton
def test_the_kernel_agrees_with_fp64() -> None:
    environment = {**launch.QUIET, "TRITON_INTERPRET": "1", "PYTHONPATH": str(launch.ROOT)}
    program = "tests/programs/reduce_in_triton_interpreter.py"
    done = launch.run([sys.executable, program], timeout=110, environment=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said["errors"]) == 3 * 2 * 3 * 3
    assert max(said["errors"].values()) < TOLERANCE
    assert set(map(tuple, said["finite"].values())) == {(True, True, True, False, True, False, True, True)}


class Launches(TorchDispatchMode):
    """Counts what would be a kernel on a GPU, and the bytes of fp32 partial results that are written."""

    NO_KERNEL = ("empty", "device")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.partial = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.NO_KERNEL:
            self.count += 1
        if name == "reduce_stretches":
            self.partial += args[2].numel() * args[2].element_size()
        return func(*args, **(kwargs or {}))


QWEN3_8B = QKVLayout(num_attention_heads=32, num_query_groups=8, kv_channels=128)


def launched(tokens: int, tp: int, weights: torch.dtype | None, statistic: Any = "mean-abs") -> Launches:
    """A layer's part of a micro-batch, and the count of tokens, on CUDA tensors without contents."""
    rows, blocks = QWEN3_8B.rows_per_partition(tp), qk_blocks(QWEN3_8B.local_qk_ranges(0, tp))
    with FakeTensorMode(), torch.device("cuda"):
        sums = Accumulator(1, rows, statistic=STATISTICS[statistic], device=torch.device("cuda"))
        x = torch.empty(tokens, rows, dtype=torch.bfloat16)
        given = None if weights is None else torch.empty(tokens, dtype=weights)
        with Launches() as seen:
            for block in blocks:
                sums.add(block.of(sums.sums[0]), block.of(x), given)
            sums.count(slice(0, 1), tokens if given is None else given.sum())
    return seen


LENGTHS = (8192, 32768, 131072)


@needs_triton
@pytest.mark.parametrize("statistic", STATISTICS)
def test_launches_do_not_depend_on_length_or_mask_and_are_those_of_the_plan(statistic: Any) -> None:
    attention, config = Attention(1, 4096, QWEN3_8B), LongActConfig(statistic=statistic)
    for tp, tokens, weights in itertools.product((1, 4), LENGTHS, (None, torch.bool, torch.float32)):
        seen = launched(tokens, tp, weights, statistic)
        batch = Batch(seq_length=tokens, global_batch_size=1, tokens_named=weights is not None)
        work = cost.capture_work(attention, Parallel(tp=tp), batch, config, place=cost.Place(1, 0))
        assert seen.count == work.operations == (4 if weights is None else 5), (tp, tokens, weights)
        assert work.activations == tokens * (32 + 8) * 128 // tp * 2
        assert work.traffic == work.activations + 2 * seen.partial
        assert work.temporary == seen.partial <= 0.03 * work.activations


@needs_triton
def test_the_page_on_performance_has_these_launches_and_bytes() -> None:
    page = (launch.ROOT / "docs/performance.md").read_text()
    rows = re.findall(r"^\| (1|4) \| ([\d,]+) \| (\d+) \| ([\d.]+) MiB \| ([\d.]+) MiB \|$", page, re.MULTILINE)
    wanted = []
    for tp, tokens in itertools.product((1, 4), LENGTHS):
        seen, read = launched(tokens, tp, torch.bool), tokens * 40 * 128 // tp * 2
        wanted.append((str(tp), f"{tokens:,}", str(seen.count), f"{read / 2**20:.0f}", f"{seen.partial / 2**20:.2f}"))
    assert rows == wanted


@needs_triton
def test_the_kernel_compiles_for_gpus_that_are_not_here() -> None:
    program = "tests/programs/compile_the_kernel.py"
    environment = {**launch.QUIET, "PYTHONPATH": str(launch.ROOT)}
    done = launch.run([sys.executable, program], timeout=100, environment=environment)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert len(sizes) == 2 * 3 * 3
    assert min(sizes.values()) > 0
