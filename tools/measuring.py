"""What the benchmarks share: the plain model, times, and bytes at a peak and held, on a GPU and without one."""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from megatron_longact.megatron.quiet import quiet_libraries

quiet_libraries()  # before a benchmark imports Megatron

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SLEEP_CYCLES = 50_000_000
"""Of a GPU's clock, about 30 ms: longer than the launches take that are measured together."""


def transformer_settings(dtype: str, *, tensor_model_parallel_size: int) -> dict[str, Any]:
    """What the TransformerConfig of every benchmark has: SwiGLU, RMSNorm, no bias, no dropout; `bf16` or `fp32`."""
    return {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype == "bf16",
        "params_dtype": torch.bfloat16 if dtype == "bf16" else torch.float32,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "use_cpu_initialization": not ON_GPU,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": ON_GPU,
        "persist_layer_norm": ON_GPU,
    }


def seconds(action: Callable[[], object], *, repeats: int) -> float:
    """Median time of an action, after one that is not counted; on a GPU that of its kernels.

    The GPU sleeps until the host has launched them all, so that it never waits for the host between two of them.
    """
    action()
    if not ON_GPU:
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            action()
            times.append(time.perf_counter() - begun)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1000


def peak_bytes(action: Callable[[], object]) -> int:
    """Bytes allocated at the peak of an action above its beginning."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def held_bytes() -> int:
    """Bytes that are allocated now: on a GPU as its allocator says, else of all tensors that Python can reach."""
    gc.collect()
    if ON_GPU:
        return torch.cuda.memory_allocated()
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def spread(values: list[float]) -> str:
    """Median, and in brackets the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"
