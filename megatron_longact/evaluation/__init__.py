"""Long-context benchmarks, from local files.

`ruler` and `longbench_v2` are pure and need no Megatron; `scoring` knows predictions of any benchmark; `program`
generates with Megatron's engine and is what `tools/evaluate.py --load` runs.
"""

from megatron_longact.tasks import longbench_v2, ruler

__all__ = ["longbench_v2", "ruler"]
