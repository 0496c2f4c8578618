"""LongBench v2 (arXiv 2412.15204): prompts, truncation, answers and the report of its own scripts.

Source: THUDM/LongBench, `prompts/*.txt`, `pred.py` and `result.py`. The templates are the benchmark's own, to the
character, so that numbers compare. An item is a dict of its JSON file: `_id`, `domain`, `sub_domain`,
`difficulty` (easy, hard), `length` (short, medium, long), `question`, `choice_A` to `choice_D`, `answer`, `context`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Style = Literal["0shot", "0shot_cot", "0shot_cot_ans", "0shot_no_context", "0shot_rag"]

MAX_LENGTH = 120_000
"""Tokens of a prompt at most, as the official `config/model2maxlen.json` has it for open models."""
TOKENS_TO_GENERATE, TOKENS_TO_GENERATE_COT = 128, 1024
TEMPERATURE = 0.1
BUCKETS = ("overall", "easy", "hard", "short", "medium", "long")

_QUESTION = "What is the correct answer to this question: $Q$\nChoices:\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$"
_FORMAT = 'ormat your response as follows: "The correct answer is (insert answer here)".'
_STEP_BY_STEP = "Let\u2019s think step by step:"

TEMPLATES: dict[Style, str] = {
    "0shot": (
        "Please read the following text and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
        f"{_QUESTION}\n\nF{_FORMAT}"
    ),
    "0shot_cot": (
        "Please read the following text and answer the questions below.\n\n<text>\n$DOC$\n</text>\n\n"
        f"{_QUESTION}\n\n{_STEP_BY_STEP}"
    ),
    "0shot_cot_ans": (
        "Please read the following text and answer the questions below.\n\nThe text is too long and omitted here.\n\n"
        f"{_QUESTION}\n\n{_STEP_BY_STEP} $COT$\n\n"
        f"Based on the above, what is the single, most likely answer choice? F{_FORMAT}"
    ),
    "0shot_no_context": f"{_QUESTION}\n\nWhat is the single, most likely answer choice? F{_FORMAT}",
    "0shot_rag": (
        "Please read the following retrieved text chunks and answer the question below.\n\n<text>\n$DOC$\n</text>\n\n"
        f"{_QUESTION}\n\nF{_FORMAT}"
    ),
}
"""By the name of the official prompt file."""


def build_prompt(item: Mapping[str, Any], *, style: Style = "0shot", reasoning: str = "", num_chunks: int = 0) -> str:
    """The prompt of an item.

    style: "0shot_cot_ans" is the second question of chain of thought and needs `reasoning`, the stripped response to
    "0shot_cot"; "0shot_rag" takes the first `num_chunks` of the item's `retrieved_context`, in the order of the text.

    Odd, and as in the official script: the fields are filled in one after the other, so a document that holds
    "$Q$" or "$C_A$" gets the question or the choice put into it. Raises ValueError for an unknown style, a field
    that the item lacks, and "0shot_rag" without chunks.
    """
    if style not in get_args(Style):
        raise ValueError(f"unknown prompt style {style!r}; known: {', '.join(get_args(Style))}")
    needed = ["question", *(f"choice_{letter}" for letter in "ABCD")]
    needed += {"0shot": ["context"], "0shot_cot": ["context"], "0shot_rag": ["retrieved_context"]}.get(style, [])
    missing = [name for name in needed if name not in item]
    if missing:
        raise ValueError(f"item {item.get('_id', '?')!r} has no {missing[0]!r}, which a {style} prompt needs")
    context = _retrieved(item, num_chunks) if style == "0shot_rag" else item.get("context", "")
    prompt = TEMPLATES[style].replace("$DOC$", context.strip()).replace("$Q$", item["question"].strip())
    for letter in "ABCD":
        prompt = prompt.replace(f"$C_{letter}$", item[f"choice_{letter}"].strip())
    return prompt.replace("$COT$", reasoning) if style == "0shot_cot_ans" else prompt


def _retrieved(item: Mapping[str, Any], num_chunks: int) -> str:
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; a 0shot_rag prompt needs at least 1")
    chunks = sorted(item["retrieved_context"][:num_chunks], key=lambda chunk: chunk["c_idx"])
    return "\n\n".join(f"Retrieved chunk {i}: {chunk['content']}" for i, chunk in enumerate(chunks, start=1))


def truncate(token_ids: Sequence[int], max_length: int) -> list[int]:
    """The ids with the middle cut out, so that `max_length` are left; all of them if they are no more.

    Of an odd `max_length` the end has one more than the beginning. Raises ValueError if it is below 1: the official
    script's slices then keep everything.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; a prompt needs at least 1 token")
    ids = list(token_ids)
    if len(ids) <= max_length:
        return ids
    beginning = max_length // 2
    return ids[:beginning] + ids[len(ids) - (max_length - beginning) :]


def extract_answer(text: str) -> str | None:
    """'A' to 'D', or None where the response does not say "The correct answer is (A)" or "... is A".

    Odd, and as in the official script: asterisks are dropped, nothing else is; the first match with brackets wins
    over an earlier one without; case matters; "The correct answer is Denmark" is D.
    """
    text = text.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        match = re.search(pattern, text)
        if match:
            return match.group(1)
    return None


def aggregate(rows: Sequence[Mapping[str, Any]], *, compensated: bool = False) -> dict[str, float | None]:
    """Percent right with one decimal, by bucket: overall, easy, hard, short, medium, long; None for an empty bucket.

    rows: `difficulty`, `length`, and `judge` (right or not) or else `pred` and `answer`, for each prediction.
    compensated: a `pred` of None counts as a quarter, the chance of guessing; off in the official script.

    Odd, and as in the official script: whatever is not "easy" counts as hard, whatever is neither "short" nor
    "medium" as long, and predictions that were never made are in no denominator. The official script stops at an
    empty bucket with a division by zero. Raises ValueError for no rows or a row without a needed field.
    """
    if not rows:
        raise ValueError("no predictions to aggregate")
    points: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
    for i, row in enumerate(rows):
        value = _points(row, number=i, compensated=compensated)
        difficulty = "easy" if row["difficulty"] == "easy" else "hard"
        length = row["length"] if row["length"] in ("short", "medium") else "long"
        for bucket in ("overall", difficulty, length):
            points[bucket].append(value)
    return {bucket: round(100 * sum(values) / len(values), 1) if values else None for bucket, values in points.items()}


def _points(row: Mapping[str, Any], *, number: int, compensated: bool) -> float:
    needed = ["difficulty", "length"] + (["pred"] if compensated else [])
    needed += [] if "judge" in row else ["pred", "answer"]
    missing = [name for name in needed if name not in row]
    if missing:
        raise ValueError(f"prediction {row.get('_id', number)!r} has no {missing[0]!r}")
    if compensated and row["pred"] is None:
        return 0.25
    return int(row["judge"] if "judge" in row else row["pred"] == row["answer"])
