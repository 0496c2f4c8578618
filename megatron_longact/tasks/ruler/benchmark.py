"""RULER as a benchmark: samples of a length, predictions in the official fields and files, tables by length.

A prediction's row has `index` and `pred` (the official names; `id` and `prediction` do too), `task` and
`max_seq_length` in the row or in its `others`, and `outputs`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_longact.tasks import by_length
from megatron_longact.tasks.benchmark import Encoder, Group, Report, Sample, other_lengths
from megatron_longact.tasks.by_length import others_of, prediction_of
from megatron_longact.tasks.pieces import TASK_TEMPLATE, PieceEncoder
from megatron_longact.tasks.rows import Id, Row, by_id, check_consecutive, field, odd, read_rows, text_of
from megatron_longact.tasks.ruler import scoring
from megatron_longact.tasks.ruler.generation import generate, least_length
from megatron_longact.tasks.ruler.tasks import TASKS

SAMPLES = 500
CATEGORIES: dict[str, list[str]] = {
    category: [name for name, task in TASKS.items() if task.category == category]
    for category in dict.fromkeys(task.category for task in TASKS.values())
}


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """RULER, asked at lengths; see `tasks.benchmark.Benchmark`. The files are those of `generate`."""

    TITLE: ClassVar[str] = "RULER"
    TASKS: ClassVar[Sequence[str]] = tuple(TASKS)
    TEMPERATURE: ClassVar[float] = 0.0

    tasks: Sequence[str] = tuple(TASKS)
    lengths: Sequence[int] = (4096,)
    num_samples: int | None = None
    sample_seed: int = 42
    tokens_to_generate: int | None = None
    model_template: str = TASK_TEMPLATE
    essays: Path | None = None
    words: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    keep_inputs: bool = False

    def samples(self, tokenizer: Encoder, *, positions: int) -> list[Group]:
        """See `Benchmark`: a group is a task at a length."""
        if max(self.lengths) > positions:
            raise ValueError(f"--lengths asks for {max(self.lengths)} tokens, but the model has {positions} positions")
        pieces = PieceEncoder(tokenizer.encode)
        return [self._group(task, length, pieces) for length in self.lengths for task in self.tasks]

    @property
    def longest_prompt(self) -> int:
        """See `Benchmark`."""
        return max(self.lengths) - min(self.tokens_to_generate or TASKS[task].tokens_to_generate for task in self.tasks)

    def check_lengths(self, tokenizer: Encoder) -> None:
        """See `Benchmark`: names the tasks that the shortest length cannot hold, and those that it can."""
        settings, length = self._settings(PieceEncoder(tokenizer.encode)), min(self.lengths)
        least = {task: least_length(task, max_seq_length=length, **settings) for task in self.tasks}
        needed = ", ".join(f"{task} (needs {tokens})" for task, tokens in least.items() if tokens > length)
        if needed:
            fit = " ".join(task for task, tokens in least.items() if tokens <= length)
            rest = f"these fit: --tasks {fit}" if fit else "give longer --lengths"
            raise ValueError(
                f"--lengths {length}: {needed} do not fit into {length} tokens with this tokenizer; {rest}"
            )

    def prompt(self, item: Mapping[str, Any]) -> str:
        """See `Benchmark`; the model's template is in it already."""
        return str(item["input"]) + str(item["answer_prefix"])

    def postprocess(self, row: Row) -> str:
        """See `Benchmark`; null is an empty answer."""
        return scoring.postprocess(row["task"], prediction_of(row))

    def score(self, row: Row) -> float:
        """See `Benchmark`."""
        return scoring.score(row["task"], [prediction_of(row)], [_references(row)])

    def report(self, rows: Mapping[Id, Row]) -> Report:
        """See `by_length.report`; the score of a task is `scoring.score`; sources: what the samples were made from."""

        def score(task: str, own: Sequence[Row]) -> float:
            return scoring.score(task, [prediction_of(row) for row in own], [_references(row) for row in own])

        sources = _sources(rows.values())
        asked = {row["task"]: TASKS[row["task"]].tokens_to_generate for row in rows.values()}
        notes = other_lengths(self.tokens_to_generate, asked)
        notes += [f"{name}: {', '.join(values)}" for name, values in sources.items()]
        made = by_length.report(
            rows,
            name="ruler",
            title=self.TITLE,
            categories=CATEGORIES,
            score=score,
            postprocess=self.postprocess,
            notes=notes,
        )
        return replace(made, results=made.results | {"sources": sources})

    def by_id(self, rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
        """Rows by (max_seq_length, task, index), complete with `task` and `max_seq_length`.

        See `by_length.placed`; the places there are the official ones. The official niah.py writes the place of the
        answer where the index belongs: in such a file the rows count from 0.
        """
        rows = by_length.placed(rows, self.TASKS)
        files: dict[str, list[Row]] = {}
        for row in rows:
            files.setdefault(row["_file"], []).append(row)
        for rows_of_file in files.values():
            if all(_has_place_for_index(row) for row in rows_of_file):
                for i, row in enumerate(rows_of_file):
                    row["index"] = i
        return by_id(rows, by_length.ID, what=what)

    def check_whole(self, rows: Mapping[Id, Row]) -> None:
        """See `Benchmark`: the indices of each task and length must be 0, 1, 2 and so on."""
        check_consecutive(rows)

    def answers(self, data: Path) -> dict[Id, Row]:
        """See `Benchmark`."""
        rows = self.by_id(read_rows(data), what="samples of --data")
        own = ("outputs", "output", "others")
        return {each: {name: row[name] for name in own if name in row} for each, row in rows.items()}

    def _group(self, task: str, length: int, pieces: PieceEncoder) -> Group:
        settings = self._settings(pieces)

        def make() -> list[Sample]:
            made = generate(task, max_seq_length=length, **settings)
            return [self._sample(task, length, sample, pieces) for sample in made]

        return Group(f"{task} at {length}", tuple((length, task, i) for i in range(settings["num_samples"])), make)

    def _settings(self, pieces: PieceEncoder) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples or SAMPLES,
            "tokenizer": pieces,
            "seed": self.sample_seed,
            "tokens_to_generate": self.tokens_to_generate,
            "model_template": self.model_template,
            "essays": self.essays,
            "words": self.words,
            "squad": self.squad,
            "hotpotqa": self.hotpotqa,
        }

    def _sample(self, task: str, length: int, sample: Mapping[str, Any], pieces: PieceEncoder) -> Sample:
        prompt = self.prompt(sample)

        def answered(response: str) -> Row:
            row = {"task": task, "max_seq_length": length, "index": sample["index"], "pred": response}
            row |= {"input": prompt} if self.keep_inputs else {}
            return row | {name: sample[name] for name in ("outputs", "others", "length")} | {"truncation": -1}

        return Sample(
            (length, task, sample["index"]),
            array("i", pieces.prompt(prompt)),
            self.tokens_to_generate or TASKS[task].tokens_to_generate,
            answered,
        )


def _references(row: Row) -> list[str]:
    """A sample's right answers (`outputs`, or the single `output` of the official scripts' other form).

    A single one may stand there without its list, and numbers are taken as they are written.
    """
    given = row["outputs"] if "outputs" in row else field(row, "output")
    answers = given if isinstance(given, list) else [given]
    texts = [text_of(row, "outputs", answer) for answer in answers]
    if not texts or any(text is None for text in texts):
        raise odd(row, "outputs", "a list of right answers", given)
    return [text for text in texts if text is not None]


def _has_place_for_index(row: Row) -> bool:
    text = row.get("input")
    if not row["task"].startswith("niah") or not row.get("outputs") or not isinstance(text, str):
        return False
    return bool(row["index"] == text.find(_references(row)[0]))


def _sources(rows: Iterable[Row]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        for name in ("haystack", "words", "questions"):
            if name in others_of(row):
                found.setdefault(name, set()).add(str(others_of(row)[name]))
    return {name: sorted(values) for name, values in found.items()}
