"""What a run leaves behind and shows: its JSON-lines files, TensorBoard, a progress bar, Megatron's output."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MEGATRON_LOG, METRICS, EVALUATIONS = "megatron.log", "metrics.jsonl", "evaluations.jsonl"
ROLLOUTS, HELDOUT = "rollouts.jsonl", "heldout.jsonl"
"""Answers of the model, to the prompts that it is trained on and to held-out ones."""
ROWS = (METRICS, EVALUATIONS, ROLLOUTS, HELDOUT)
"""Files of rows, each with its iteration, of which a resumed run makes the last ones again."""


@contextmanager
def output_in_file(path: Path) -> Iterator[TextIO]:
    """Send this process's standard output, log records and warnings to a file; yields the terminal.

    Megatron prints hundreds of lines from all ranks. Standard error stays where it is, so a crash is
    still seen. The redirection is of the file descriptor, so it holds for child processes too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    saved = os.dup(1)
    handler = logging.StreamHandler(sys.stdout)
    root = logging.getLogger()
    with open(path, "a", buffering=1) as file, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        os.dup2(file.fileno(), 1)
        root.addHandler(handler)
        logging.captureWarnings(True)
        try:
            yield terminal
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)


class Progress:
    """One line that says how far a run is: redrawn on a terminal, else printed now and then."""

    def __init__(self, total: int, stream: TextIO, *, done: int = 0, interval_s: float = 10.0) -> None:
        self.total = total
        self.stream = stream
        self.interval_s = interval_s
        self._first = done
        self._begun = self._last_shown = time.monotonic()
        self._live = stream.isatty()

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def update(self, iteration: int, values: Mapping[str, str], *, now_too: bool = False) -> None:
        """Show `iteration` of `total`, the values and the time left; now_too: also if the last line was just now."""
        now = time.monotonic()
        waits = now - self._last_shown < self.interval_s and not now_too
        if not self._live and iteration < self.total and waits:
            return
        self._last_shown = now
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        line = f"{self._bar(iteration)} {iteration}/{self.total}  {shown}  {self._left(iteration)}"
        if self._live:
            self._clear()
            self.stream.write(line)
            self.stream.flush()
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """End the line."""
        if self._live:
            print(file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._live:
            self.stream.write("\r\x1b[2K")

    def _bar(self, iteration: int, width: int = 24) -> str:
        filled = round(width * iteration / max(self.total, 1))
        return f"[{'#' * filled}{'.' * (width - filled)}]"

    def _left(self, iteration: int) -> str:
        done = iteration - self._first
        elapsed = time.monotonic() - self._begun
        if done <= 0:
            return ""
        if iteration >= self.total:
            return f"{_minutes(elapsed)} in all"
        return f"{_minutes(elapsed / done * (self.total - iteration))} left"


class MetricsLog:
    """Rows of a run, each appended to a JSON-lines file and its numbers written to TensorBoard.

    path: None on processes that do not write the file. writer: a `SummaryWriter`, on the process that has one
    (Megatron: the last rank). Rows after `resume_from` leave an existing file for `replaced(path)`, since a resumed run
    makes them again.
    """

    def __init__(self, path: Path | None, writer: Any | None, *, resume_from: int = 0) -> None:
        self._writer = writer
        self._file: TextIO | None = None
        if path is not None:
            _keep_rows_until(path, resume_from)
            # as JSON writes what is no character: \ud800
            self._file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")

    def write(self, row: Mapping[str, Any], *, iteration: int, in_tensorboard: Container[str] = ()) -> None:
        """Append `row`; None, NaN and Inf are null in the file, and None is left out of TensorBoard.

        in_tensorboard: names that somebody else writes there.
        """
        if self._file is not None:
            finite = {name: value if _is_json(value) else None for name, value in row.items()}
            self._file.write(json.dumps({"iteration": iteration, **finite}, ensure_ascii=False) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in in_tensorboard:
                    self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class RunLog:
    """What a training writes and shows of itself: rows in files, TensorBoard, the console.

    folder: of the files; None on processes that neither write files nor show anything. writer: see `MetricsLog`; closed
    with the log.
    done: the iteration, out of `total`, at which this process begins; evaluated: that of the last evaluation that is
    not made again, -1 before the first.
    """

    def __init__(
        self, folder: Path | None, terminal: TextIO, writer: Any | None, *, total: int, done: int, evaluated: int
    ) -> None:
        kept = {METRICS: done, EVALUATIONS: evaluated, ROLLOUTS: done, HELDOUT: evaluated}
        self._writer = writer
        self._rows = {
            name: MetricsLog(
                None if folder is None else folder / name,
                writer if name in (METRICS, EVALUATIONS) else None,
                resume_from=kept[name],
            )
            for name in ROWS
        }
        self._progress = None if folder is None else Progress(total, terminal, done=done)

    @property
    def writes(self) -> bool:
        """Whether this process writes anything of what is written."""
        return self._progress is not None or self._writer is not None

    def write_step(self, row: Mapping[str, Any], *, iteration: int, in_tensorboard: Container[str]) -> None:
        """A row of metrics.jsonl; in_tensorboard: see `MetricsLog.write`."""
        self._rows[METRICS].write(row, iteration=iteration, in_tensorboard=in_tensorboard)

    def write_evaluation(self, row: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """A row of evaluations.jsonl, which has its own iteration, and the scalars that TensorBoard shows of it."""
        # Under names of their own: `accuracy` is that of the rollouts.
        self._rows[EVALUATIONS].write({**row, **scalars}, iteration=row["iteration"], in_tensorboard=row.keys())

    def write_answers(self, name: str, rows: Sequence[Mapping[str, Any]], text: str, *, iteration: int) -> None:
        """Rows of a file of answers, ROLLOUTS or HELDOUT, and their text in TensorBoard; nothing for no rows."""
        for row in rows:
            self._rows[name].write(row, iteration=iteration)
        if self._writer is not None and rows:
            self._writer.add_text(f"answers/{name.partition('.')[0]}", text, iteration)

    def say(self, text: str) -> None:
        """A line on the console, which stays."""
        if self._progress is not None:
            self._progress.say(text)

    def show(self, iteration: int, values: Mapping[str, str], *, now_too: bool = False) -> None:
        """How far the run is; see `Progress.update`."""
        if self._progress is not None:
            self._progress.update(iteration, values, now_too=now_too)

    def close(self) -> None:
        """Close the files and end the console's line."""
        for rows in self._rows.values():
            rows.close()
        if self._writer is not None:
            self._writer.close()
        if self._progress is not None:
            self._progress.close()


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def replaced(path: Path) -> Path:
    """Where the rows go that a resumed run makes again."""
    return path.with_suffix(f".replaced{path.suffix}")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a file that may be being written; `ValueError` for a line that is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _row(line, where=f"{path}, line {number}")


def _row(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no row of a run, it is not JSON in UTF-8") from error
    if not isinstance(row, dict) or "iteration" not in row:
        raise ValueError(f"{where}: no row of a run, it names no iteration")
    return row


def _keep_rows_until(path: Path, iteration: int) -> None:
    if not path.exists():
        return
    rewritten, later = path.with_suffix(".tmp"), 0
    with path.open("rb") as lines, rewritten.open("wb") as kept, replaced(path).open("ab") as moved:
        for line in lines:
            if not line.endswith(b"\n"):  # a row that a kill cut off
                later += 1
            elif json.loads(line)["iteration"] > iteration:
                later += moved.write(line)
            else:
                kept.write(line)
        emptied = moved.tell() == 0
    if emptied:
        replaced(path).unlink()
    if later:
        rewritten.replace(path)  # at once: a run killed here loses no row
    else:
        rewritten.unlink()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
