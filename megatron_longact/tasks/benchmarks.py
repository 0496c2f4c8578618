"""The benchmarks that there are, by the names of `--benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_longact.tasks.benchmark import Benchmark
from megatron_longact.tasks.infinitebench.benchmark import InfiniteBench
from megatron_longact.tasks.longbench_v2 import LongBenchV2
from megatron_longact.tasks.needle_benchmark import Needle
from megatron_longact.tasks.ruler.benchmark import Ruler

BENCHMARKS: dict[str, type[Benchmark]] = {
    "ruler": Ruler,
    "longbench-v2": LongBenchV2,
    "infinitebench": InfiniteBench,
    "needle": Needle,
}


def why_alone(name: str) -> str:
    """Why nothing can stand around a benchmark's prompts; "" where something can."""
    can = any(field.name == "model_template" for field in fields(BENCHMARKS[name]))  # type: ignore[arg-type]
    return "" if can else f"{BENCHMARKS[name].TITLE} prompts are text to go on with, of an exact length"


def benchmark_from(name: str, settings: Mapping[str, Any]) -> Benchmark:
    """The benchmark of a name, with those of the settings that it has fields for."""
    kind: Any = BENCHMARKS[name]
    benchmark: Benchmark = kind(**{own.name: settings[own.name] for own in fields(kind) if own.name in settings})
    return benchmark
