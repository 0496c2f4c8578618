"""LongBench v2 beside the evaluation that asks it; the benchmark itself is `megatron_longact.tasks.longbench_v2`."""

from megatron_longact.tasks.longbench_v2 import aggregate, build_prompt, extract_answer, truncate

__all__ = ["aggregate", "build_prompt", "extract_answer", "truncate"]
