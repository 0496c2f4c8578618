"""RULER (arXiv 2404.06654): the 13 tasks of the official suite, made by any tokenizer, for any length.

    samples = ruler.generate("niah_multikey_1", num_samples=500, max_seq_length=32768, tokenizer=tokenizer, seed=42)
    percent = ruler.score("niah_multikey_1", predictions, [sample["outputs"] for sample in samples])

What is as in the official scripts (NVIDIA/RULER, `scripts/`), and what is not, stands at `generate`.
"""

from megatron_longact.tasks.ruler.generation import generate, least_length
from megatron_longact.tasks.ruler.scoring import count_nulls, postprocess, score
from megatron_longact.tasks.ruler.tasks import TASKS, RulerTask

__all__ = ["TASKS", "RulerTask", "count_nulls", "generate", "least_length", "postprocess", "score"]
