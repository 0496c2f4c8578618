"""Predictions of a benchmark as rows: read from files, identified, and checked against what there should be.

A row is a dict, an Id says which sample it answers. RULER rows have `index` and `pred` (the official names; `id` and
`prediction` do too), `task` and `max_seq_length` in the row or in its `others`, and `outputs`. LongBench v2 rows have
`_id` (or `id`) and `response` (or `prediction`), or `pred` with the letter alone, and the item's fields.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_longact.evaluation.longbench_v2 import extract_answer
from megatron_longact.evaluation.ruler.tasks import TASKS

Row = dict[str, Any]
Id = tuple[Any, ...]
_SHOWN = 5
_BESIDE_PREDICTIONS = {"results.json", "settings.json"}


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, a JSON list, or all such files of a folder and what is below it.

    Passed over in a folder: hidden files and folders, and what tools/evaluate.py writes beside its predictions.
    Each row gets `_file`. Raises ValueError for a file that is not there or holds anything else.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _holds_predictions(file, path))
        if not files:
            raise ValueError(f"the folder {path} holds no .jsonl file")
        return [row for file in files for row in read_rows(file)]
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    rows = _parse(text, path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} is not a JSON object")
    return [{**row, "_file": str(path)} for row in rows]


def _holds_predictions(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    ours = file.name in _BESIDE_PREDICTIONS and (file.parent / "predictions.jsonl").exists()
    return file.suffix in (".jsonl", ".json") and not hidden and not ours


def _parse(text: str, path: Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON list: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
    return rows


def ruler_rows(rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
    """RULER rows by (max_seq_length, task, index), complete with `task` and `max_seq_length`.

    The task of a row without one is the name of its file (`vt.jsonl`) or of its file's folder (`vt/validation.jsonl`),
    the length a number among the folders; these are the official places. The official niah.py writes the place of
    the answer where the index belongs: in such a file the rows count from 0. what: for messages, "predictions".

    Raises ValueError for a row without a known task or an index, and for a doubled id.
    """
    placed = [{**row, "task": _task_of(row), "max_seq_length": _length_of(row)} for row in rows]
    for row in placed:
        if "index" not in row:
            row["index"] = _field(row, "id")
    files = {row["_file"]: [other for other in placed if other["_file"] == row["_file"]] for row in placed}
    for rows_of_file in files.values():
        if all(_has_place_for_index(row) for row in rows_of_file):
            for i, row in enumerate(rows_of_file):
                row["index"] = i
    return _by_id(placed, ("max_seq_length", "task", "index"), what)


def longbench_rows(rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
    """LongBench v2 rows by `_id`; ValueError for a row without one and for a doubled one."""
    return _by_id([{**row, "_id": row["_id"] if "_id" in row else _field(row, "id")} for row in rows], ("_id",), what)


def _task_of(row: Row) -> str:
    path = Path(row["_file"])
    candidates = [row.get("task"), (row.get("others") or {}).get("task"), path.stem, path.parent.name]
    found = [name for name in candidates if name in TASKS]
    if not found:
        raise ValueError(f"a row of {path} has no 'task', and neither the file nor its folder is named after one")
    return str(found[0])


def _length_of(row: Row) -> int:
    given = row.get("max_seq_length", (row.get("others") or {}).get("max_seq_length"))
    numbers = [part for part in Path(row["_file"]).parts if part.isdecimal()]
    return int(given if given is not None else numbers[-1] if numbers else 0)


def _has_place_for_index(row: Row) -> bool:
    outputs, text = row.get("outputs"), row.get("input")
    if not row["task"].startswith("niah") or not outputs or not isinstance(text, str):
        return False
    return row["index"] == text.find(outputs[0])


def _by_id(rows: Sequence[Row], names: Sequence[str], what: str) -> dict[Id, Row]:
    ids = [tuple(row[name] for name in names) for row in rows]
    doubled = [found for found, count in Counter(ids).items() if count > 1]
    if doubled:
        raise ValueError(f"the {what} hold {len(doubled)} doubled {_noun(doubled)}: {_some(doubled)}")
    return dict(zip(ids, rows, strict=True))


def check_complete(found: Iterable[Id], expected: Iterable[Id]) -> None:
    """Raise ValueError, naming some, if ids are missing from `found` or unknown to `expected`."""
    found, expected = dict.fromkeys(found), dict.fromkeys(expected)
    missing = [each for each in expected if each not in found]
    unknown = [each for each in found if each not in expected]
    if missing or unknown:
        parts = [
            f"{len(ids)} {name} {_noun(ids)}: {_some(ids)}"
            for name, ids in (("missing", missing), ("unknown", unknown))
            if ids
        ]
        raise ValueError(f"the predictions have {'; '.join(parts)} (of {len(expected)} samples)")


def check_consecutive(ids: Iterable[Id]) -> None:
    """Raise ValueError unless the RULER ids of each task and length are 0, 1, 2 and so on without a gap.

    A task and length with an id that is no whole number is left alone: nothing says what ids there should be.
    """
    groups: dict[Id, set[Any]] = {}
    for *group, index in ids:
        groups.setdefault(tuple(group), set()).add(index)
    counted = {group: own for group, own in groups.items() if all(isinstance(index, int) for index in own)}
    found = [(*group, index) for group, own in counted.items() for index in own]
    check_complete(
        found, [(*group, i) for group, own in counted.items() for i in range(min(max(own) + 1, 2 * len(own)))]
    )


def ruler_prediction(row: Row) -> str:
    """The text that answers a RULER sample."""
    return str(_field(row, "pred", "prediction"))


def ruler_references(row: Row) -> list[Any]:
    """A RULER sample's right answers (`outputs`, or the single `output` of the official scripts' other form)."""
    return list(row["outputs"]) if "outputs" in row else [_field(row, "output")]


def longbench_answer(row: Row) -> str | None:
    """The letter that answers a LongBench v2 item, from the response if the row has it; None if there is none."""
    for name in ("response", "prediction"):
        if isinstance(row.get(name), str):
            return extract_answer(row[name].strip())
    pred = _field(row, "pred")
    return pred if pred in (None, *"ABCD") else extract_answer(str(pred))


def _field(row: Row, *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"a row of {row['_file']} has no {' or '.join(map(repr, names))}: {_short(row)}")


def _short(row: Row) -> str:
    return ", ".join(name for name in row if name != "_file")


def _noun(ids: Sequence[Id]) -> str:
    return "id" if len(ids) == 1 else "ids"


def _some(ids: Sequence[Id]) -> str:
    shown = [" ".join(str(part) for part in each) for each in ids[:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(ids) > _SHOWN else "")
