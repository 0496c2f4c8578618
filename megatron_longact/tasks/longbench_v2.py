"""LongBench v2 (arXiv 2412.15204): prompts, truncation, answers and the report of its own scripts.

Source: THUDM/LongBench, `prompts/*.txt`, `pred.py` and `result.py`. The templates are the benchmark's own, to the
character, so that numbers compare. An item is a dict of its JSON file: `_id`, `domain`, `sub_domain`,
`difficulty` (easy, hard), `length` (short, medium, long), `question`, `choice_A` to `choice_D`, `answer`, `context`.
A prediction's row has `_id` (or `id`) and `response` (or `prediction`), or `pred` with the letter alone, and the item's
fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from megatron_longact.tasks.benchmark import Bars, Encoder, Group, Report, Results, Sample, Table, counted_as, percent
from megatron_longact.tasks.cut_prompts import CutPrompts, truncate
from megatron_longact.tasks.intervals import METHOD, percent_interval, with_interval
from megatron_longact.tasks.pieces import TASK_TEMPLATE
from megatron_longact.tasks.rows import Id, Row, by_id, field, odd, read_rows, text_of

__all__ = ["LongBenchV2", "aggregate", "build_prompt", "extract_answer", "truncate"]

Style = Literal["0shot", "0shot_cot", "0shot_cot_ans", "0shot_no_context", "0shot_rag"]

MAX_LENGTH = 120_000
"""Tokens of a prompt at most, as the official `config/model2maxlen.json` has it for open models."""
TOKENS_TO_GENERATE, TOKENS_TO_GENERATE_COT = 128, 1024
BUCKETS = ("overall", "easy", "hard", "short", "medium", "long")
GROUP = 64
"""Items that are tokenized at once: before it is cut an item can have millions of tokens."""
_NEEDED = ("answer", "difficulty", "length")

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
        for bucket in _buckets_of(row):
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


def _buckets_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    length = row["length"] if row["length"] in ("short", "medium") else "long"
    return "overall", "easy" if row["difficulty"] == "easy" else "hard", length


@dataclass(frozen=True, kw_only=True)
class LongBenchV2:
    """LongBench v2; see `tasks.benchmark.Benchmark`. data: the benchmark's JSON file."""

    TITLE: ClassVar[str] = "LongBench v2"
    TASKS: ClassVar[Sequence[str]] = ()
    TEMPERATURE: ClassVar[float] = 0.1

    data: Path | None = None
    num_samples: int | None = None
    style: Style = "0shot"
    num_chunks: int = 0
    max_length: int | None = None
    model_template: str = TASK_TEMPLATE

    def samples(self, tokenizer: Encoder, *, positions: int) -> list[Group]:
        """See `Benchmark`: `GROUP` items are a group."""
        if self.data is None:
            raise ValueError("--benchmark longbench-v2 needs its file: --data data.json")
        items = list(self.by_id(read_rows(self.data), what="items of --data").values())[: self.num_samples]
        if not items:
            raise ValueError(f"{self.data} holds no items")
        prompts = CutPrompts(
            tokenizer,
            template=self.model_template,
            positions=positions,
            tokens_to_generate=TOKENS_TO_GENERATE_COT if self.style == "0shot_cot" else TOKENS_TO_GENERATE,
            max_length=self.max_length,
            official=MAX_LENGTH,
        )
        for item in items:
            self._check(item)
        return [self._group(items[i : i + GROUP], prompts) for i in range(0, len(items), GROUP)]

    @property
    def longest_prompt(self) -> int:
        """See `Benchmark`: not known."""
        return 0

    def check_lengths(self, tokenizer: Encoder) -> None:
        """See `Benchmark`: what is too long is cut."""

    def prompt(self, item: Mapping[str, Any]) -> str:
        """See `Benchmark`: of chain of thought the first question."""
        return build_prompt(item, style=self.style, num_chunks=self.num_chunks)

    def postprocess(self, row: Row) -> str | None:
        """The letter that answers an item, from the response if the row has it; None if there is none."""
        for name in ("response", "prediction"):
            if row.get(name) is not None:
                return extract_answer((text_of(row, name, row[name]) or "").strip())
        if "pred" not in row and ("response" in row or "prediction" in row):
            return None
        pred = (text_of(row, "pred", field(row, "pred")) or "").strip()
        letter = re.fullmatch(r"\(?([A-D])[).]*", pred)
        return letter[1] if letter else extract_answer(pred)

    def score(self, row: Row) -> float:
        """See `Benchmark`."""
        return 100.0 * (self.postprocess(row) == _right_letter(row))

    def report(self, rows: Mapping[Id, Row]) -> Report:
        """Scores by bucket, compensated ones too, counts, and answers not found."""
        judged = []
        for row in rows.values():
            missing = [name for name in _NEEDED if name not in row]
            if missing:
                raise ValueError(
                    f"the row of {row['_id']} has no {missing[0]!r}; give the benchmark's file with --data"
                )
            judged.append({**row, "pred": self.postprocess(row), "judge": self.score(row) == 100})
        samples = dict.fromkeys(BUCKETS, 0)
        for bucket in (bucket for row in judged for bucket in _buckets_of(row)):
            samples[bucket] += 1
        results: Results = {
            "benchmark": "longbench-v2",
            "scores": aggregate(judged),
            "compensated": aggregate(judged, compensated=True),
            "interval": METHOD,
            "intervals": {bucket: _interval(judged, bucket) for bucket in BUCKETS},
            "samples": samples,
            "no_answer": sum(row["pred"] is None for row in judged),
        }
        return Report(results, _table(results), _picture(results))

    def by_id(self, rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
        """Rows by `_id`."""
        named = [{**row, "_id": field(row, "_id", "id")} for row in rows]
        for row in named:
            if not isinstance(row["_id"], str | int) or isinstance(row["_id"], bool):
                raise odd(row, "_id", "a string or a whole number")
        return by_id(named, ("_id",), what=what)

    def check_whole(self, rows: Mapping[Id, Row]) -> None:
        """See `Benchmark`: ids of this benchmark say nothing of others."""

    def answers(self, data: Path) -> dict[Id, Row]:
        """See `Benchmark`."""
        rows = self.by_id(read_rows(data), what="samples of --data")
        return {each: {name: row[name] for name in _NEEDED if name in row} for each, row in rows.items()}

    def _check(self, item: Row) -> None:
        """Raise ValueError for an item that lacks what the prompt or the score needs."""
        missing = [name for name in _NEEDED if name not in item]
        if missing:
            raise ValueError(f"item {item['_id']!r} of {self.data} has no {missing[0]!r}")
        _right_letter(item)
        self.prompt(item)

    def _group(self, items: Sequence[Row], prompts: CutPrompts) -> Group:
        ids = tuple((item["_id"],) for item in items)
        return Group(self.TITLE, ids, lambda: [self._first(item, prompts) for item in items])

    def _first(self, item: Row, prompts: CutPrompts) -> Sample:
        if self.style != "0shot_cot":
            return self._sample(item, prompts, self.prompt(item), TOKENS_TO_GENERATE)

        def ask(reasoning: str) -> Sample:
            prompt = build_prompt(item, style="0shot_cot_ans", reasoning=reasoning.strip())
            extra = {"response_cot": reasoning.strip()}
            return self._sample(item, prompts, prompt, TOKENS_TO_GENERATE, extra)

        first = self._sample(item, prompts, self.prompt(item), TOKENS_TO_GENERATE_COT)
        return replace(first, follow_up=ask)

    def _sample(
        self, item: Row, prompts: CutPrompts, prompt: str, tokens_to_generate: int, extra: Row | None = None
    ) -> Sample:
        def answered(response: str) -> Row:
            response = response.strip()
            pred = extract_answer(response)
            kept = {name: item[name] for name in item if name not in ("context", "retrieved_context", "_file")}
            context = {"context": item["context"][:1000]} if "context" in item else {}
            judged = {"response": response, "pred": pred, "judge": pred == item["answer"]}
            return kept | context | (extra or {}) | judged

        return Sample((item["_id"],), prompts.tokens(prompt), tokens_to_generate, answered)


def _interval(judged: Sequence[Row], bucket: str) -> list[float] | None:
    own = [100.0 * row["judge"] for row in judged if bucket in _buckets_of(row)]
    return percent_interval(sum(own) / len(own), len(own)) if own else None


def _right_letter(row: Row) -> str:
    letter = row["answer"]
    if letter not in tuple("ABCD"):
        raise odd(row, "answer", "A, B, C or D")
    return str(letter)


def _table(results: Results) -> Table:
    """Buckets down: percent right, with guesses for missing answers, and the number of items."""
    lines = [
        [
            bucket,
            with_interval(percent(results["scores"][bucket], digits=1), results["intervals"][bucket]),
            percent(results["compensated"][bucket], digits=1),
            str(results["samples"][bucket]),
        ]
        for bucket in BUCKETS
    ]
    missing = counted_as(results["no_answer"], "response")
    notes = [f"{missing} without an answer: wrong, and a quarter right if compensated", f"(low-high): {METHOD}"]
    return Table(["items", "percent", "compensated", "number"], lines, notes)


def _picture(results: Results) -> Bars:
    """Percent right by bucket, with the chance of guessing."""
    return Bars(
        "LongBench v2 by difficulty and by length",
        axis="right, percent",
        groups=(BUCKETS[:1], BUCKETS[1:3], BUCKETS[3:]),
        values=results["scores"],
        counts=results["samples"],
        chance=25,
    )
