"""InfiniteBench (arXiv 2402.13718): the prompts, the truncation and the scores of its own scripts.

    prompt = infinitebench.build_prompt("kv_retrieval", item)
    right = infinitebench.label("kv_retrieval", item)
    share = infinitebench.score("kv_retrieval", prediction, right)

An item is a line of a task's JSON file: `context`, `input`, `answer`, `options`. What is odd in the official scripts
(OpenBMB/InfiniteBench, `src/`) is kept, and stands at the functions.
"""

from megatron_longact.tasks.cut_prompts import truncate
from megatron_longact.tasks.infinitebench.prompts import TASKS, Task, build_prompt
from megatron_longact.tasks.infinitebench.scoring import aggregate, label, score

__all__ = ["TASKS", "Task", "aggregate", "build_prompt", "label", "score", "truncate"]
