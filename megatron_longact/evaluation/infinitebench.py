"""InfiniteBench beside the evaluation that asks it; the benchmark itself is `megatron_longact.tasks.infinitebench`."""

from megatron_longact.tasks.infinitebench import TASKS, aggregate, build_prompt, label, score, truncate

__all__ = ["TASKS", "aggregate", "build_prompt", "label", "score", "truncate"]
