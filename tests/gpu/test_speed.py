"""The GPU tier: what LongAct may cost, measured by the benchmarks themselves."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests import launch
from tests.gpu.models import GPU_TIER, skip_without_chip
from tests.launch import on_ranks

pytestmark = [*GPU_TIER, pytest.mark.timeout(600)]

SECONDS_BEYOND_A_COPY = 20e-6
"""Beyond reading as many bytes at a copy's rate: two kernels and what is between them (an H100: 11 to 14 µs)."""

TEMPORARIES = 1 / 8
OVER_DENSE = 1.005


def run(tool: str, output: Path, *flags: str) -> Any:
    environment = launch.QUIET | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = on_ranks(1, f"tools/{tool}", "--output", str(output), *flags)
    done = launch.run(command, timeout=580, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def test_capture_reads_q_and_k_nearly_as_fast_as_a_copy(tmp_path: Path, record_property: Any) -> None:
    numbers = run("benchmark_capture.py", tmp_path / "capture.json", "--candidates", "reduce")
    record_property("copy GB/s", numbers["copy_gb_per_s"])
    ours = numbers["results"]
    for result in ours:
        tokens = "masked" if result["masked"] else "all"
        case = f"{result['tokens']} tokens, TP {result['tp']}, {result['statistic']}, {tokens}"
        record_property(case, f"{result['seconds'] * 1e6:.0f} µs, {result['of_the_copy']:.0%} of a copy's speed")
    assert max(result["temporaries"] for result in ours) <= TEMPORARIES
    assert max(result["error"] for result in ours) < 1e-5
    assert max(result["seconds"] * (1 - result["of_the_copy"]) for result in ours) <= SECONDS_BEYOND_A_COPY


@pytest.mark.parametrize(
    ("seq_length", "num_microbatches", "num_layers"), [(8192, 8, 4), (32768, 2, 4), (131072, 1, 1)]
)
def test_a_step_with_longact_takes_no_longer(
    seq_length: int, num_microbatches: int, num_layers: int, tmp_path: Path, record_property: Any
) -> None:
    """Steps of 65,536 tokens and more, layers of Qwen3-8B's shape in FP8."""
    skip_without_chip("tensorwise")
    shape = ["--hidden-size", "4096", "--kv-channels", "128", "--num-layers", str(num_layers)]
    numerics = ["--dtype", "bf16", "--fp8", "hybrid", "--fp8-recipe", "tensorwise", "--recompute"]
    length = ["--seq-length", str(seq_length), "--num-microbatches", str(num_microbatches)]
    rounds = ["--rounds", "6", "--arms", "dense", "refresh", "--refresh-interval", "1"]
    (measured,) = run("benchmark_overhead.py", tmp_path / "step.json", *shape, *numerics, *length, *rounds)["runs"]
    dense, longact = (measured["arms"][name] for name in ("dense", "refresh"))
    ratio = statistics.median(mine / plain for mine, plain in zip(longact["seconds"], dense["seconds"], strict=True))
    record_property("over dense", ratio)
    record_property("dense, s a step", statistics.median(dense["seconds"]))
    more = {field: (longact[field] - dense[field]) / 2**20 for field in ("peak_bytes", "held_bytes")}
    record_property("MiB more", f"{more['peak_bytes']:.1f} at the peak, {more['held_bytes']:.1f} held")
    assert ratio <= OVER_DENSE
