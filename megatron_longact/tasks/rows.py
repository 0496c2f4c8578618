"""Rows of samples and predictions: read from files, identified, and checked against what there should be.

A row is a dict, an `Id` says which sample it is or answers. Which fields a benchmark's rows have stands there.
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

Row = dict[str, Any]
Id = tuple[Any, ...]
_SHOWN = 5
_BESIDE_PREDICTIONS = {"results.json", "settings.json"}


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, a JSON list, or all such files of a folder and what is below it.

    Passed over in a folder: hidden files and folders, and what `longact evaluate` writes beside its predictions.
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


def whole(value: Any) -> int | None:
    """A whole number, also one that is written 3.0 or "3"."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*\d{1,18}\s*", value) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and math.isfinite(value) and value == int(value) else None


def by_id(rows: Sequence[Row], names: Sequence[str], *, what: str) -> dict[Id, Row]:
    """Rows by the values of the named fields; ValueError for a doubled id. what: for messages, "predictions"."""
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
    """Raise ValueError unless the ids of each group, which end with an index, are 0, 1, 2 and so on without a gap.

    A group with an index that is no whole number is left alone: nothing says what ids there should be.
    """
    groups: dict[Id, set[Any]] = {}
    for *group, index in ids:
        groups.setdefault(tuple(group), set()).add(index)
    counted = {group: own for group, own in groups.items() if all(isinstance(index, int) for index in own)}
    found = [(*group, index) for group, own in counted.items() for index in own]
    check_complete(
        found, [(*group, i) for group, own in counted.items() for i in range(min(max(own) + 1, 2 * len(own)))]
    )


def text_of(row: Row, name: str, value: Any) -> str | None:
    """A text that stands there as such, as a number, or as the only one of a list; None for null."""
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise odd(row, name, "a text", value)
    return str(value)


def odd(row: Row, name: str, wanted: str, value: Any = None) -> ValueError:
    """The refusal of a row's field (or of the given part of it) that is not what is wanted."""
    shown, id = json.dumps(row.get(name) if value is None else value), row.get("_id", row.get("index", row.get("id")))
    return ValueError(f"row {id!r} of {row['_file']} has {shown[:80]} as its {name!r}; it must be {wanted}")


def field(row: Row, *names: str) -> Any:
    """The first of the named fields that the row has; ValueError if it has none."""
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
