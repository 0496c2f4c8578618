"""Predictions of a benchmark as rows: read from files, identified, and checked against what there should be.

A row is a dict, an Id says which sample it answers. RULER rows have `index` and `pred` (the official names; `id` and
`prediction` do too), `task` and `max_seq_length` in the row or in its `others`, and `outputs`. LongBench v2 rows have
`_id` (or `id`) and `response` (or `prediction`), or `pred` with the letter alone, and the item's fields.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_longact.tasks.json_lines import parse_json
from megatron_longact.tasks.longbench_v2 import extract_answer
from megatron_longact.tasks.ruler.tasks import TASKS

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
            return list(parse_json(text))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON list: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(parse_json(line))
            except ValueError as error:
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
        row["index"] = _index_of(row)
    files = {row["_file"]: [other for other in placed if other["_file"] == row["_file"]] for row in placed}
    for rows_of_file in files.values():
        if all(_has_place_for_index(row) for row in rows_of_file):
            for i, row in enumerate(rows_of_file):
                row["index"] = i
    return _by_id(placed, ("max_seq_length", "task", "index"), what)


def longbench_rows(rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
    """LongBench v2 rows by `_id`; ValueError for a row without one and for a doubled one."""
    named = [{**row, "_id": _field(row, "_id", "id")} for row in rows]
    for row in named:
        if not isinstance(row["_id"], str | int) or isinstance(row["_id"], bool):
            raise _odd(row, "_id", "a string or a whole number")
    return _by_id(named, ("_id",), what)


def _task_of(row: Row) -> str:
    path = Path(row["_file"])
    candidates = [row.get("task"), _others(row).get("task"), path.stem, path.parent.name]
    found = [name for name in candidates if isinstance(name, str) and name in TASKS]
    if not found:
        raise ValueError(f"a row of {path} has no 'task', and neither the file nor its folder is named after one")
    return str(found[0])


def _length_of(row: Row) -> int:
    given = row.get("max_seq_length", _others(row).get("max_seq_length"))
    numbers = [part for part in Path(row["_file"]).parts if part.isdecimal()]
    if given is None:
        return int(numbers[-1] if numbers else 0)
    length = _whole(given)
    if length is None:
        raise _odd(row, "max_seq_length", "a whole number", given)
    return length


def _index_of(row: Row) -> int | str:
    """Whole numbers as such, however they are written; other ids of a text as they are."""
    given = row["index"] if "index" in row else _field(row, "id")
    index = _whole(given)
    if index is None and not isinstance(given, str):
        raise _odd(row, "index", "a whole number or a string", given)
    return given if index is None else index


def _others(row: Row) -> dict[str, Any]:
    others = row.get("others")
    return others if isinstance(others, dict) else {}


def _whole(value: Any) -> int | None:
    """A whole number, also one that is written 3.0 or "3"."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*\d{1,18}\s*", value) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and math.isfinite(value) and value == int(value) else None


def _has_place_for_index(row: Row) -> bool:
    text = row.get("input")
    if not row["task"].startswith("niah") or not row.get("outputs") or not isinstance(text, str):
        return False
    return bool(row["index"] == text.find(ruler_references(row)[0]))


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
    """The text that answers a RULER sample; null is none, which is empty."""
    name = "pred" if "pred" in row else "prediction"
    return _text(row, name, _field(row, "pred", "prediction")) or ""


def ruler_references(row: Row) -> list[str]:
    """A RULER sample's right answers (`outputs`, or the single `output` of the official scripts' other form).

    A single one may stand there without its list, and numbers are taken as they are written.
    """
    given = row["outputs"] if "outputs" in row else _field(row, "output")
    answers = given if isinstance(given, list) else [given]
    texts = [_text(row, "outputs", answer) for answer in answers]
    if not texts or any(text is None for text in texts):
        raise _odd(row, "outputs", "a list of right answers", given)
    return [text for text in texts if text is not None]


def longbench_answer(row: Row) -> str | None:
    """The letter that answers a LongBench v2 item, from the response if the row has it; None if there is none."""
    for name in ("response", "prediction"):
        if row.get(name) is not None:
            return extract_answer((_text(row, name, row[name]) or "").strip())
    if "pred" not in row and ("response" in row or "prediction" in row):
        return None
    pred = (_text(row, "pred", _field(row, "pred")) or "").strip()
    letter = re.fullmatch(r"\(?([A-D])[).]*", pred)
    return letter[1] if letter else extract_answer(pred)


def longbench_reference(row: Row) -> str:
    """The right letter of a LongBench v2 item."""
    letter = row["answer"]
    if letter not in tuple("ABCD"):
        raise _odd(row, "answer", "A, B, C or D")
    return str(letter)


def _text(row: Row, name: str, value: Any) -> str | None:
    """A text that stands there as such, as a number, or as the only one of a list; None for null."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _odd(row, name, "a text", value)
    return str(value)


def _odd(row: Row, name: str, wanted: str, value: Any = None) -> ValueError:
    shown, id = json.dumps(row.get(name) if value is None else value), row.get("_id", row.get("index"))
    return ValueError(f"row {id!r} of {row['_file']} has {shown[:80]} as its {name!r}; it must be {wanted}")


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
