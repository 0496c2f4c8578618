"""From predictions to results: checked, scored, shown, and written as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from megatron_longact.evaluation.arguments import EvaluationConfig
from megatron_longact.megatron.tool_command import check_new
from megatron_longact.tasks.benchmark import Benchmark, Report, Table
from megatron_longact.tasks.benchmarks import benchmark_from
from megatron_longact.tasks.rows import Id, Row, check_complete, read_rows

RESULTS, PICTURE = "results.json", "scores.png"


def checked_predictions(benchmark: Benchmark, predictions: Path, data: Path | None) -> dict[Id, Row]:
    """Rows of a file or folder of predictions, one for each sample of `data`; they take its answers.

    Without `data` only the gaps that the benchmark can see in the predictions themselves are refused: what is missing
    at the end is not seen then. Raises ValueError for missing, doubled and unknown ids.
    """
    found = benchmark.by_id(read_rows(predictions), what="predictions")
    if not found:
        raise ValueError(f"{predictions} holds no predictions")
    if data is None:
        benchmark.check_whole(found)
        return found
    expected = benchmark.answers(data)
    check_complete(found, expected)
    return {each: found[each] | answer for each, answer in expected.items()}


def check_replaces(output: Path, predictions: Path) -> None:
    """Raise `ValueError` if the results in a folder are not an earlier score of these very predictions."""
    path = output / RESULTS
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"predictions": str(predictions)}
    check_new(path, overwrite=before.get("predictions") == str(predictions))


def score_file(config: EvaluationConfig, predictions: Path, *, terminal: TextIO) -> None:
    """Score a file or folder of predictions as the configuration says; ValueError as `checked_predictions`."""
    benchmark = benchmark_from(config.benchmark, vars(config))
    rows = checked_predictions(benchmark, predictions, config.data)
    about = {"predictions": str(predictions), "data": None if config.data is None else str(config.data)}
    if config.data is None:
        print("checked without --data: samples missing at the end would not be seen", file=terminal)
    write_report(benchmark.report(rows), output=config.output, terminal=terminal, about=about)


def write_report(report: Report, *, output: Path, terminal: TextIO, about: Mapping[str, Any]) -> None:
    """Print the table, write `results.json` and, with matplotlib, `scores.png` into `output`.

    about: what else `results.json` says, such as the settings.
    """
    print(table_text(report.table), file=terminal)
    output.mkdir(parents=True, exist_ok=True)
    results = report.results | dict(about)
    (output / RESULTS).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    written = [RESULTS]
    if find_spec("matplotlib") is not None:
        from megatron_longact.evaluation.plots import plot

        plot(report.picture, path=output / PICTURE)
        written.append(PICTURE)
    else:
        print("no picture: matplotlib is not installed (the extra 'plots')", file=terminal)
    print(f"{' and '.join(written)} in {output}", file=terminal, flush=True)


def table_text(table: Table) -> str:
    """A table as text: the first column to the left, figures to the right, notes below."""
    cells = [table.heads, *table.lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.heads))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line_text(line: Any) -> str:
        padded = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *padded])

    out = [line_text(table.heads), rule]
    for line in table.lines:
        out += [rule] if table.rule_before and line[0] == table.rule_before else []
        out.append(line_text(line))
    return "\n".join([*out, *table.notes])
