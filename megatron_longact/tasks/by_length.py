"""What benchmarks of several tasks at several lengths have in common: ids, figures, the table, the picture.

Their rows have `index` and `pred` (`id` and `prediction` do too), `task` and `max_seq_length` in the row or in its
`others`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_longact.tasks.benchmark import Curves, Report, Results, Table, counted_as, percent
from megatron_longact.tasks.intervals import METHOD, NOTE, percent_interval, samples_of_mean, with_interval
from megatron_longact.tasks.rows import Id, Row, field, odd, text_of, whole

ID = ("max_seq_length", "task", "index")


def placed(rows: Sequence[Row], tasks: Collection[str]) -> list[Row]:
    """Rows complete with the fields of `ID`; ValueError for a row without a known task or an index.

    The task of a row without one is the name of its file (`vt.jsonl`) or of its file's folder (`vt/validation.jsonl`),
    the length a number among the folders, or 0.
    """
    ids = [{"task": _task_of(row, tasks), "max_seq_length": _length_of(row), "index": _index_of(row)} for row in rows]
    return [row | id for row, id in zip(rows, ids, strict=True)]


def prediction_of(row: Row) -> str:
    """The text that answers a sample; null is none, which is empty."""
    name = "pred" if "pred" in row else "prediction"
    return text_of(row, name, field(row, "pred", "prediction")) or ""


def others_of(row: Row) -> dict[str, Any]:
    """What a row's `others` holds."""
    others = row.get("others")
    return others if isinstance(others, dict) else {}


def report(
    rows: Mapping[Id, Row],
    *,
    name: str,
    title: str,
    categories: Mapping[str, Sequence[str]],
    score: Callable[[str, Sequence[Row]], float],
    postprocess: Callable[[Row], str],
    notes: Sequence[str] = (),
) -> Report:
    """Figures of predictions by (max_seq_length, task, index).

    scores: by length, then task, percent as `score`; averages: by length, the plain mean of its tasks; intervals and
    average_intervals: of these, as `interval` says; nulls (predictions of which nothing is left after `postprocess`)
    and samples: counts, arranged as scores. A length of 0 is one that nothing told. categories: tasks of each, in the
    order of tables and pictures.
    """
    tasks = [task for own in categories.values() for task in own]
    groups: dict[tuple[int, str], list[Row]] = {}
    for (length, task, _), row in rows.items():
        groups.setdefault((length, task), []).append(row)
    results: Results = {"benchmark": name, "scores": {}, "averages": {}, "nulls": {}, "samples": {}}
    results |= {"interval": METHOD, "intervals": {}, "average_intervals": {}}
    for length in sorted({length for length, _ in groups}):
        own = {task: groups[length, task] for task in tasks if (length, task) in groups}
        scores = {task: score(task, each) for task, each in own.items()}
        results["scores"][str(length)] = scores
        results["averages"][str(length)] = round(sum(scores.values()) / len(scores), 2)
        results["nulls"][str(length)] = {task: sum(not postprocess(row) for row in each) for task, each in own.items()}
        results["samples"][str(length)] = counts = {task: len(each) for task, each in own.items()}
        results["intervals"][str(length)] = {task: percent_interval(scores[task], counts[task]) for task in own}
        worth = samples_of_mean(list(counts.values()))
        results["average_intervals"][str(length)] = percent_interval(results["averages"][str(length)], worth)
    return Report(results, _table(results, tasks, notes), picture(results, title, categories))


def picture(results: Results, title: str, categories: Mapping[str, Sequence[str]]) -> Curves:
    """The mean of each category by length, and of all tasks; every task by length."""
    scores = list(results["scores"].values())
    tasks = [task for own in categories.values() for task in own]
    return Curves(
        f"{title} by category",
        lengths=["unknown" if length == "0" else length for length in results["scores"]],
        categories={category: [_mean(each, own) for each in scores] for category, own in categories.items()},
        means=list(results["averages"].values()),
        tasks={task: [each.get(task) for each in scores] for task in tasks if any(task in each for each in scores)},
    )


def _mean(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    own = [scores[task] for task in tasks if task in scores]
    return sum(own) / len(own) if own else None


def _table(results: Results, tasks: Sequence[str], notes: Sequence[str]) -> Table:
    """Tasks down, lengths across, and their average."""
    lengths = list(results["scores"])
    asked = [task for task in tasks if any(task in results["scores"][length] for length in lengths)]
    cells = {task: [_cell(results["scores"][n], results["intervals"][n], task) for n in lengths] for task in asked}
    cells["average"] = [_cell(results["averages"], results["average_intervals"], n) for n in lengths]
    counts = {count for of_length in results["samples"].values() for count in of_length.values()}
    counted = counted_as(counts.pop(), "sample") if len(counts) == 1 else f"{min(counts)} to {max(counts)} samples"
    nulls = counted_as(sum(sum(of_length.values()) for of_length in results["nulls"].values()), "empty prediction")
    heads = ["task", *("unknown length" if n == "0" else f"{n} tokens" for n in lengths)]
    lines = [[name, *values] for name, values in cells.items()]
    return Table(heads, lines, [f"percent, {counted} each; {nulls}", NOTE, *notes], rule_before="average")


def _cell(scores: Mapping[str, float], intervals: Mapping[str, Sequence[float]], name: str) -> str:
    return with_interval(percent(scores.get(name), digits=2), intervals.get(name))


def _task_of(row: Row, tasks: Collection[str]) -> str:
    path = Path(row["_file"])
    candidates = [row.get("task"), others_of(row).get("task"), path.stem, path.parent.name]
    found = [name for name in candidates if isinstance(name, str) and name in tasks]
    if not found:
        raise ValueError(f"a row of {path} has no 'task', and neither the file nor its folder is named after one")
    return str(found[0])


def _length_of(row: Row) -> int:
    given = row.get("max_seq_length", others_of(row).get("max_seq_length"))
    numbers = [part for part in Path(row["_file"]).parts if part.isdecimal()]
    if given is None:
        return int(numbers[-1] if numbers else 0)
    length = whole(given)
    if length is None:
        raise odd(row, "max_seq_length", "a whole number", given)
    return length


def _index_of(row: Row) -> int | str:
    """Whole numbers as such, however they are written; other ids of a text as they are."""
    given = row["index"] if "index" in row else field(row, "id")
    index = whole(given)
    if index is None and not isinstance(given, str):
        raise odd(row, "index", "a whole number or a string", given)
    return given if index is None else index
