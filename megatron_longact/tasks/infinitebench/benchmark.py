"""InfiniteBench as a benchmark: a folder of its JSON files, predictions in the official fields and files.

A prediction's row has `task` (or stands in the official `preds_TASK.jsonl`), `id` (the place of the item in its file,
from 0), `prediction` (or `pred`) and `ground_truth` (or `label`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from megatron_longact.tasks.benchmark import (
    Bars,
    Encoder,
    Group,
    Report,
    Results,
    Sample,
    Table,
    counted_as,
    other_lengths,
    percent,
)
from megatron_longact.tasks.cut_prompts import CutPrompts
from megatron_longact.tasks.infinitebench.prompts import TASKS, build_prompt
from megatron_longact.tasks.infinitebench.scoring import aggregate, check_rouge, label, score
from megatron_longact.tasks.intervals import METHOD, NOTE, percent_interval, samples_of_mean, with_interval
from megatron_longact.tasks.json_lines import parse_json
from megatron_longact.tasks.pieces import TASK_TEMPLATE
from megatron_longact.tasks.rows import Id, Row, by_id, field, odd, text_of, whole

MAX_LENGTH = 128 * 1024
"""Tokens of a prompt at most, as in the official scripts for YaRN-Mistral and ChatGLM3; Yi has 200,000 there."""
GROUP = 32
"""Items that are read and tokenized at once: before it is cut an item can have millions of tokens."""


@dataclass(frozen=True, kw_only=True)
class InfiniteBench:
    """InfiniteBench; see `tasks.benchmark.Benchmark`. data: the folder with `passkey.jsonl` and its like."""

    TITLE: ClassVar[str] = "InfiniteBench"
    TASKS: ClassVar[Sequence[str]] = tuple(TASKS)
    TEMPERATURE: ClassVar[float] = 0.0

    data: Path | None = None
    tasks: Sequence[str] = tuple(TASKS)
    num_samples: int | None = None
    tokens_to_generate: int | None = None
    max_length: int | None = None
    model_template: str = TASK_TEMPLATE
    keep_inputs: bool = False

    def samples(self, tokenizer: Encoder, *, positions: int) -> list[Group]:
        """See `Benchmark`: `GROUP` items of a task are a group. All items are read once, to check them."""
        if self.data is None:
            raise ValueError("--benchmark infinitebench needs the folder with its files: --data FOLDER")
        if "longbook_sum_eng" in self.tasks:
            check_rouge()
        return [group for task in self.tasks for group in self._groups(task, tokenizer, positions)]

    @property
    def longest_prompt(self) -> int:
        """See `Benchmark`: not known."""
        return 0

    def check_lengths(self, tokenizer: Encoder) -> None:
        """See `Benchmark`: what is too long is cut."""

    def prompt(self, item: Mapping[str, Any]) -> str:
        """See `Benchmark`; an item has its `task`."""
        return build_prompt(item["task"], item)

    def postprocess(self, row: Row) -> str:
        """See `Benchmark`: the text as it is; null is an empty one."""
        name = "prediction" if "prediction" in row else "pred"
        return text_of(row, name, field(row, "prediction", "pred")) or ""

    def score(self, row: Row) -> float:
        """See `Benchmark`."""
        return 100 * self._share(row)

    def report(self, rows: Mapping[Id, Row]) -> Report:
        """Scores by task, percent with two decimals; their plain mean; counts, and empty predictions."""
        own = {task: [row for row in rows.values() if row["task"] == task] for task in TASKS}
        own = {task: each for task, each in own.items() if each}
        shares = {task: aggregate(task, [{"score": self._share(row)} for row in each]) for task, each in own.items()}
        scores = {task: round(100 * share, 2) for task, share in shares.items()}
        results: Results = {
            "benchmark": "infinitebench",
            "scores": scores,
            "average": (average := round(sum(scores.values()) / len(scores), 2)),
            "interval": METHOD,
            "intervals": {task: percent_interval(scores[task], len(each)) for task, each in own.items()},
            "average_interval": percent_interval(average, samples_of_mean([len(each) for each in own.values()])),
            "nulls": {task: sum(not self.postprocess(row).strip() for row in each) for task, each in own.items()},
            "samples": {task: len(each) for task, each in own.items()},
        }
        official = {task: TASKS[task].tokens_to_generate for task in own}
        return Report(results, _table(results, other_lengths(self.tokens_to_generate, official)), _picture(results))

    def by_id(self, rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
        """Rows by (task, id), complete with both."""
        return by_id([{**row, "task": _task_of(row), "id": _index_of(row)} for row in rows], ("task", "id"), what=what)

    def check_whole(self, rows: Mapping[Id, Row]) -> None:
        """See `Benchmark`: nothing; the predictions that the official repository holds have gaps."""

    def answers(self, data: Path) -> dict[Id, Row]:
        """See `Benchmark`: of the tasks that are asked."""
        return {
            (task, i): {"ground_truth": _right(item)}
            for task in self.tasks
            for i, item in enumerate(_File(data, task).items(self.num_samples))
        }

    def _share(self, row: Row) -> float:
        return score(row["task"], self.postprocess(row), field(row, "ground_truth", "label"))

    def _groups(self, task: str, tokenizer: Encoder, positions: int) -> Iterator[Group]:
        assert self.data is not None
        prompts = CutPrompts(
            tokenizer,
            template=self.model_template,
            positions=positions,
            tokens_to_generate=self.tokens_to_generate or TASKS[task].tokens_to_generate,
            max_length=self.max_length,
            official=MAX_LENGTH,
        )
        file = _File(self.data, task)
        places = []
        for item in file.items(self.num_samples):
            try:
                self.prompt(item)
                _right(item)
            except ValueError as error:
                raise ValueError(f"{file.path}: {error}") from error
            places.append(item["_place"])
        if not places:
            raise ValueError(f"{file.path} holds no items")
        for begin in range(0, len(places), GROUP):
            own = dict(enumerate(places[begin : begin + GROUP], start=begin))
            yield Group(task, tuple((task, i) for i in own), partial(self._make, file, own, prompts))

    def _make(self, file: _File, places: Mapping[int, int], prompts: CutPrompts) -> list[Sample]:
        return [self._sample(i, file.item(place), prompts) for i, place in places.items()]

    def _sample(self, index: int, item: Row, prompts: CutPrompts) -> Sample:
        task, prompt = item["task"], self.prompt(item)
        kept = {"ground_truth": _right(item)} | ({"input": prompt} if self.keep_inputs else {})

        def answered(response: str) -> Row:
            return {"task": task, "id": index, "prediction": response, **kept}

        return Sample((task, index), prompts.tokens(prompt), prompts.tokens_to_generate, answered)


class _File:
    """A task's file, read line by line: some have more than a gigabyte. Items get `task`, and `_place` in the file."""

    def __init__(self, folder: Path, task: str) -> None:
        self.path, self.task = folder / f"{task}.jsonl", task
        if not self.path.is_file():
            there = " ".join(name for name in TASKS if (folder / f"{name}.jsonl").is_file())
            rest = f"; these are there: --tasks {there}" if there else ""
            raise ValueError(f"{folder} has no {task}.jsonl{rest}")

    def items(self, count: int | None) -> Iterator[Row]:
        """The first `count` items, or all."""
        return islice(self._all(), count)

    def item(self, place: int) -> Row:
        """The item at a place."""
        with self.path.open("rb") as file:
            file.seek(place)
            return self._parse(file.readline(), place)

    def _all(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            place = 0
            for line in file:
                if line.strip():
                    yield self._parse(line, place)
                place += len(line)

    def _parse(self, line: bytes, place: int) -> Row:
        try:
            item = parse_json(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"the line of {self.path} at byte {place} is no JSON: {error}") from error
        if not isinstance(item, dict):
            raise ValueError(f"the line of {self.path} at byte {place} is no item: {item!r:.60}")
        return {**item, "task": self.task, "_place": place}


def _right(item: Row) -> Any:
    """The label of an item. kv_retrieval's may stand in a list, as other ways to load the data have it."""
    right = label(item["task"], item)
    alone = item["task"] == "kv_retrieval" and isinstance(right, list) and len(right) == 1
    return right[0] if alone else right


def _task_of(row: Row) -> str:
    stem = re.sub(r"^preds_|_\d+-\d+$", "", Path(row["_file"]).stem)
    found = [name for name in (row.get("task"), stem) if isinstance(name, str) and name in TASKS]
    if not found:
        raise ValueError(f"a row of {row['_file']} has no 'task', and its file is not called preds_TASK.jsonl")
    return found[0]


def _index_of(row: Row) -> int:
    index = whole(field(row, "id"))
    if index is None:
        raise odd(row, "id", "a whole number")
    return index


def _table(results: Results, notes: Sequence[str]) -> Table:
    """Tasks down, with their names in the paper: percent, and the number of items."""
    lines = [
        [
            task,
            TASKS[task].title,
            with_interval(percent(score, digits=2), results["intervals"][task]),
            str(results["samples"][task]),
        ]
        for task, score in results["scores"].items()
    ]
    average = with_interval(percent(results["average"], digits=2), results["average_interval"])
    lines.append(["average", "", average, str(sum(results["samples"].values()))])
    notes = [counted_as(sum(results["nulls"].values()), "empty prediction"), NOTE, *notes]
    return Table(["task", "in the paper", "percent", "number"], lines, notes, rule_before="average")


def _picture(results: Results) -> Bars:
    """A bar a task, by category."""
    categories = dict.fromkeys(task.category for task in TASKS.values())
    groups = [[task for task in results["scores"] if TASKS[task].category == category] for category in categories]
    return Bars(
        "InfiniteBench by task",
        axis="score, percent",
        groups=groups,
        values=results["scores"],
        counts=results["samples"],
        lying=True,
    )
