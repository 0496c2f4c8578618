"""predictions.jsonl of an evaluation, and the settings that it was made with, so that a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_longact.tasks.rows import Row

PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"


def open_log(folder: Path, settings: Mapping[str, Any]) -> list[Row]:
    """The rows that are there already; a last line that was not written to its end is dropped.

    Raises ValueError if the folder holds an evaluation with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / SETTINGS, json.loads(json.dumps(settings))
    if path.exists() and (folder / PREDICTIONS).exists():
        before = json.loads(path.read_text("utf-8"))
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if changed and "\n" in (folder / PREDICTIONS).read_text("utf-8"):
            name = changed[0]
            raise ValueError(
                f"{folder} holds an evaluation with another {name} ({before.get(name)!r}, not {now.get(name)!r}): "
                "give another --output, or --overwrite to replace it"
            )
    elif (folder / PREDICTIONS).exists():
        raise ValueError(f"{folder} holds predictions without {SETTINGS}: give another --output, or --overwrite")
    path.write_text(json.dumps(now, indent=2) + "\n", "utf-8")
    return _rows_so_far(folder / PREDICTIONS)


def _rows_so_far(path: Path) -> list[Row]:
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    return [{**json.loads(line), "_file": str(path)} for line in whole.split("\n") if line]


class PredictionLog:
    """Appends rows; each call is on disk when it returns."""

    def __init__(self, folder: Path) -> None:
        self._file: TextIO = (folder / PREDICTIONS).open("a", encoding="utf-8")

    def append(self, rows: Iterable[Row]) -> None:
        """Write the rows at the end of the file."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
