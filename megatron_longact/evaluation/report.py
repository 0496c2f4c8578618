"""Scores of checked predictions: the figures, as JSON and as a table for the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_longact.evaluation.predictions import (
    Id,
    Row,
    longbench_answer,
    longbench_reference,
    ruler_prediction,
    ruler_references,
)
from megatron_longact.tasks import longbench_v2, ruler
from megatron_longact.tasks.ruler.tasks import TASKS

Results = dict[str, Any]


def ruler_results(rows: Mapping[Id, Row]) -> Results:
    """Figures of RULER predictions by (max_seq_length, task, index).

    scores: by length, then task, percent as `ruler.score`; averages: by length, the plain mean of its tasks; nulls
    and samples: counts, arranged as scores; sources: what the samples were made from, where the rows say so.
    A length of 0 is one that nothing told.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for (length, task, _), row in rows.items():
        groups.setdefault((length, task), []).append(row)
    results: Results = {"benchmark": "ruler", "scores": {}, "averages": {}, "nulls": {}, "samples": {}}
    lengths = sorted({length for length, _ in groups})
    for length in lengths:
        own = {task: groups[length, task] for task in TASKS if (length, task) in groups}
        predictions = {task: [ruler_prediction(row) for row in each] for task, each in own.items()}
        references = {task: [ruler_references(row) for row in each] for task, each in own.items()}
        scores = {task: ruler.score(task, predictions[task], references[task]) for task in own}
        results["scores"][str(length)] = scores
        results["averages"][str(length)] = round(sum(scores.values()) / len(scores), 2)
        results["nulls"][str(length)] = {task: ruler.count_nulls(task, predictions[task]) for task in own}
        results["samples"][str(length)] = {task: len(each) for task, each in own.items()}
    return results | {"sources": _sources(rows.values())}


def _sources(rows: Any) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        others = row.get("others")
        for name in ("haystack", "words", "questions"):
            if isinstance(others, dict) and name in others:
                found.setdefault(name, set()).add(str(others[name]))
    return {name: sorted(values) for name, values in found.items()}


def ruler_table(results: Results) -> str:
    """Tasks down, lengths across, and their average."""
    lengths = list(results["scores"])
    tasks = [task for task in TASKS if any(task in results["scores"][length] for length in lengths)]
    cells = {task: [_percent(results["scores"][n].get(task), digits=2) for n in lengths] for task in tasks}
    cells["average"] = [_percent(results["averages"][n], digits=2) for n in lengths]
    heads = ["task", *("unknown length" if n == "0" else f"{n} tokens" for n in lengths)]
    counts = {count for of_length in results["samples"].values() for count in of_length.values()}
    counted = f"{counts.pop()} samples each" if len(counts) == 1 else f"{min(counts)} to {max(counts)} samples each"
    nulls = sum(sum(of_length.values()) for of_length in results["nulls"].values())
    lines = [_table(heads, [[name, *values] for name, values in cells.items()], rule_before="average")]
    lines.append(f"percent, {counted}; {nulls} empty predictions")
    lines += [f"{name}: {', '.join(values)}" for name, values in results.get("sources", {}).items()]
    return "\n".join(lines)


def longbench_results(rows: Mapping[Id, Row]) -> Results:
    """Figures of LongBench v2 predictions: scores by bucket, compensated ones too, counts, and answers not found."""
    judged = []
    for row in rows.values():
        missing = [name for name in ("answer", "difficulty", "length") if name not in row]
        if missing:
            raise ValueError(f"the row of {row['_id']} has no {missing[0]!r}; give the benchmark's file with --data")
        pred = longbench_answer(row)
        judged.append({**row, "pred": pred, "judge": pred == longbench_reference(row)})
    return {
        "benchmark": "longbench-v2",
        "scores": longbench_v2.aggregate(judged),
        "compensated": longbench_v2.aggregate(judged, compensated=True),
        "samples": _bucket_sizes(judged),
        "no_answer": sum(row["pred"] is None for row in judged),
    }


def _bucket_sizes(rows: Sequence[Row]) -> dict[str, int]:
    sizes = dict.fromkeys(longbench_v2.BUCKETS, 0)
    for row in rows:
        difficulty = "easy" if row["difficulty"] == "easy" else "hard"
        length = row["length"] if row["length"] in ("short", "medium") else "long"
        for bucket in ("overall", difficulty, length):
            sizes[bucket] += 1
    return sizes


def longbench_table(results: Results) -> str:
    """Buckets down: percent right, with guesses for missing answers, and the number of items."""
    lines = [
        [
            bucket,
            _percent(results["scores"][bucket], digits=1),
            _percent(results["compensated"][bucket], digits=1),
            str(results["samples"][bucket]),
        ]
        for bucket in longbench_v2.BUCKETS
    ]
    note = f"{results['no_answer']} responses without an answer; they count as wrong, and a quarter if compensated"
    return f"{_table(['items', 'percent', 'compensated', 'number'], lines)}\n{note}"


def _percent(value: float | None, *, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, rule_before: str = "") -> str:
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    out = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(heads, widths, strict=True))
        ),
        rule,
    ]
    for line in lines:
        if rule_before and line[0] == rule_before:
            out.append(rule)
        out.append(
            "  ".join(
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    return "\n".join(out)
