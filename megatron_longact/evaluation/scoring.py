"""From predictions to results: checked, scored, shown, and written as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from megatron_longact.evaluation.arguments import Benchmark, EvaluationConfig
from megatron_longact.evaluation.predictions import (
    Id,
    Row,
    check_complete,
    check_consecutive,
    longbench_rows,
    read_rows,
    ruler_rows,
)
from megatron_longact.evaluation.report import (
    longbench_results,
    longbench_table,
    ruler_results,
    ruler_table,
)
from megatron_longact.megatron.tool_command import check_new

RESULTS, PICTURE = "results.json", "scores.png"


def rows_by_id(benchmark: Benchmark, rows: list[Row], *, what: str = "predictions") -> dict[Id, Row]:
    """Rows by id; ValueError for a doubled id or a row without one."""
    return ruler_rows(rows, what=what) if benchmark == "ruler" else longbench_rows(rows, what=what)


def checked_predictions(benchmark: Benchmark, predictions: Path, data: Path | None) -> dict[Id, Row]:
    """Rows of a file or folder of predictions, one for each sample of `data`; they take its answers.

    Without `data` the indices of each RULER task and length must be 0, 1, 2 and so on: what is missing at the end
    is not seen then, nor is any missing or unknown item of LongBench v2. Raises ValueError for missing, doubled and
    unknown ids.
    """
    found = rows_by_id(benchmark, read_rows(predictions))
    if not found:
        raise ValueError(f"{predictions} holds no predictions")
    if data is None:
        if benchmark == "ruler":
            check_consecutive(found)
        return found
    expected = rows_by_id(benchmark, read_rows(data), what="samples of --data")
    check_complete(found, expected)
    own = ("outputs", "output", "others") if benchmark == "ruler" else ("answer", "difficulty", "length")
    return {each: found[each] | {k: v for k, v in row.items() if k in own} for each, row in expected.items()}


def check_replaces(output: Path, predictions: Path) -> None:
    """Raise `ValueError` if the results in a folder are not an earlier score of these very predictions."""
    path = output / RESULTS
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"predictions": str(predictions)}
    check_new(path, overwrite=before.get("predictions") == str(predictions))


def score_file(config: EvaluationConfig, predictions: Path, *, terminal: TextIO) -> None:
    """Score a file or folder of predictions as the configuration says; ValueError as `checked_predictions`."""
    rows = checked_predictions(config.benchmark, predictions, config.data)
    about = {"predictions": str(predictions), "data": None if config.data is None else str(config.data)}
    if config.data is None:
        print("checked without --data: samples missing at the end would not be seen", file=terminal)
    report(config.benchmark, rows, output=config.output, terminal=terminal, about=about)


def report(
    benchmark: Benchmark, rows: Mapping[Id, Row], *, output: Path, terminal: TextIO, about: Mapping[str, Any]
) -> None:
    """Score the rows; print the table, write `results.json` and, with matplotlib, `scores.png` into `output`.

    about: what else `results.json` says, such as the settings.
    """
    results = ruler_results(rows) if benchmark == "ruler" else longbench_results(rows)
    print(ruler_table(results) if benchmark == "ruler" else longbench_table(results), file=terminal)
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text(json.dumps(results | dict(about), indent=2, ensure_ascii=False) + "\n", "utf-8")
    written = [RESULTS]
    if find_spec("matplotlib") is not None:
        from megatron_longact.evaluation.plots import plot

        plot(results, path=output / PICTURE)
        written.append(PICTURE)
    else:
        print("no picture: matplotlib is not installed (the extra 'plots')", file=terminal)
    print(f"{_and(written)} in {output}", file=terminal, flush=True)


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)
