"""The 13 tasks with the official defaults.

Source: NVIDIA/RULER, `scripts/synthetic.yaml` (numbers of needles, hops, repetitions),
`scripts/data/synthetic/constants.py` (templates and tokens to generate) and `scripts/eval/synthetic/constants.py`
(metrics). The templates are the benchmark's own, to the character: a number is comparable only if the model reads
the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["niah", "variable_tracking", "common_words_extraction", "freq_words_extraction", "qa"]
Metric = Literal["all", "part"]
Haystack = Literal["noise", "essay", "needle"]
Token = Literal["words", "numbers", "uuids"]
"""What a key or a value is made of."""


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """One task of the suite; `TASKS` has all of them."""

    name: str
    family: Family
    """The official script that makes it."""
    template: str
    """What comes before the answer; fields in braces are filled in for each sample."""
    answer_prefix: str
    """The beginning of the answer, which the model goes on from."""
    tokens_to_generate: int
    metric: Metric = "all"
    """Share of the references that the prediction holds, or 1 if it holds any."""
    category: Literal["retrieval", "tracing", "aggregation", "question answering"]
    """As the paper groups them."""

    haystack: Haystack = "noise"
    keys: Token = "words"
    values: Token = "numbers"
    num_keys: int = 1
    """Needles' keys, the asked ones included (num_needle_k, raised to num_needle_q as the script does)."""
    num_values: int = 1
    num_queries: int = 1

    num_chains: int = 1
    num_hops: int = 4

    repeats_common: int = 30
    repeats_uncommon: int = 3
    num_common: int = 10

    alpha: float = 2.0
    """Exponent of the zeta distribution of coded words."""
    coded_word_length: int = 6

    dataset: Literal["squad", "hotpotqa"] = "squad"


def _niah(name: str, **settings: object) -> RulerTask:
    return RulerTask(
        name=name,
        family="niah",
        category="retrieval",
        tokens_to_generate=128,
        template=(
            "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
            "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
        ),
        answer_prefix=" The special magic {type_needle_v} for {query} mentioned in the provided text are",
        **settings,  # type: ignore[arg-type]
    )


_VARIABLE_TRACKING = RulerTask(
    name="vt",
    family="variable_tracking",
    category="tracing",
    tokens_to_generate=30,
    template=(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value {query} in the text above."
    ),
    answer_prefix=(
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
        "assigned the value {query}, they are: "
    ),
)

_COMMON_WORDS = RulerTask(
    name="cwe",
    family="common_words_extraction",
    category="aggregation",
    tokens_to_generate=120,
    template=(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    ),
    answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
)

_FREQUENT_WORDS = RulerTask(
    name="fwe",
    family="freq_words_extraction",
    category="aggregation",
    tokens_to_generate=50,
    template=(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    ),
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
)


def _qa(name: str, dataset: Literal["squad", "hotpotqa"]) -> RulerTask:
    return RulerTask(
        name=name,
        family="qa",
        category="question answering",
        metric="part",
        dataset=dataset,
        tokens_to_generate=32,
        template=(
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
            "documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}"
        ),
        answer_prefix=" Answer:",
    )


TASKS: dict[str, RulerTask] = {
    task.name: task
    for task in (
        _niah("niah_single_1", haystack="noise"),
        _niah("niah_single_2", haystack="essay"),
        _niah("niah_single_3", haystack="essay", values="uuids"),
        _niah("niah_multikey_1", haystack="essay", num_keys=4),
        _niah("niah_multikey_2", haystack="needle"),
        _niah("niah_multikey_3", haystack="needle", keys="uuids", values="uuids"),
        _niah("niah_multivalue", haystack="essay", num_values=4),
        _niah("niah_multiquery", haystack="essay", num_keys=4, num_queries=4),
        _VARIABLE_TRACKING,
        _COMMON_WORDS,
        _FREQUENT_WORDS,
        _qa("qa_1", "squad"),
        _qa("qa_2", "hotpotqa"),
    )
}
"""By name, in the official order."""


def task_named(name: str) -> RulerTask:
    """The task of `TASKS`; ValueError with the known names for any other."""
    if name not in TASKS:
        raise ValueError(f"unknown RULER task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
