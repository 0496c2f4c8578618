"""Long-context benchmarks, from local files.

`ruler`, `longbench_v2` and `infinitebench` are pure and need no Megatron; `scoring` knows predictions of any benchmark;
`program` generates with Megatron's engine and is what `longact evaluate --load` runs.
"""

from megatron_longact.tasks import infinitebench, longbench_v2, ruler

__all__ = ["infinitebench", "longbench_v2", "ruler"]
