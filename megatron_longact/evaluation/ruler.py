"""RULER beside the evaluation that asks it; the benchmark itself is `megatron_longact.tasks.ruler`."""

from megatron_longact.tasks.ruler import TASKS, RulerTask, count_nulls, generate, least_length, postprocess, score

__all__ = ["TASKS", "RulerTask", "count_nulls", "generate", "least_length", "postprocess", "score"]
