"""A folder that is either whole or not there.

It is written as `NAME.partial` beside its place, and gets its name at the end. What stops a conversion from outside (a
kill, a power cut, Ctrl-C) leaves `NAME.partial` with a journal of the files that are finished, and the same command
goes on there; an error takes it away.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

_JOURNAL = "conversion.journal"


class Staging:
    """The folder while it is written: `path`, and a journal of finished units."""

    def __init__(self, path: Path, journal: IO[str], finished: dict[str, Any]) -> None:
        """Use `staged`."""
        self.path, self._journal, self._finished = path, journal, finished

    def finished(self, unit: str) -> Any:
        """What was noted of a unit that an earlier start finished; None if it has still to be written."""
        return self._finished.get(unit)

    def note(self, unit: str, record: Any) -> None:
        """Write down that a unit's file is whole and on the disk. record: something that JSON has."""
        self._journal.write(json.dumps({"unit": unit, "record": record}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


@contextmanager
def staged(target: Path, *, source: Any, sizes: Sequence[tuple[str, int]]) -> Iterator[Staging]:
    """Write `target` by way of a folder beside it; `target` appears when the block ends well.

    source: what the conversion is made from, as something that JSON has; an earlier start is taken up only if it was
    the same. sizes: what is written, in order: names, and bytes. Raises `ValueError` if the target exists, if another
    process is writing it, or if the disk is too small, and removes what was written at any error.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; give another name, or remove it first")
    path = target.with_name(target.name + ".partial")
    try:
        path.mkdir(parents=True, exist_ok=True)
        journal = (path / _JOURNAL).open("a+")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    with journal:
        _lock(journal, path)  # outside of what removes the folder: it may be another process's
        try:
            finished = _take_up(path, journal, source)
            _check_space(path, sizes)
            yield Staging(path, journal, finished)
            _move(path, target)
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise ValueError(f"cannot write {target}: {error.strerror or error}") from error
            raise


def identity(file: Path) -> list[Any]:
    """What tells a file from an edited one."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def _lock(journal: IO[str], path: Path) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {path}") from error


def _take_up(path: Path, journal: IO[str], source: Any) -> dict[str, Any]:
    """What an earlier start with the same source finished; if it had another source, the folder is emptied."""
    fingerprint = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    journal.seek(0)
    lines = [line for line in journal.read().split("\n") if line]
    try:
        first, *rest = [json.loads(line) for line in lines]
    except ValueError:  # killed in the middle of the last line
        first, *rest = [json.loads(line) for line in lines[:-1]] or [None]
    if first == {"source": fingerprint}:
        finished = {line["unit"]: line["record"] for line in rest}
    else:
        finished = {}
        for file in path.iterdir():
            if file.name != _JOURNAL:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    journal.truncate(0)
    journal.write(json.dumps({"source": fingerprint}) + "\n")
    for unit, record in finished.items():
        journal.write(json.dumps({"unit": unit, "record": record}) + "\n")
    journal.flush()
    return finished


def _check_space(path: Path, sizes: Sequence[tuple[str, int]]) -> None:
    there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(path).free + there
    total = sum(nbytes for _, nbytes in sizes)
    for (name, _), end in zip(sizes, accumulate(nbytes for _, nbytes in sizes), strict=True):
        if end > free:
            raise ValueError(
                f"the disk of {path.parent} is too full from {name} on: {total:,} bytes are needed, {free:,} are free"
            )


def _move(path: Path, target: Path) -> None:
    (path / _JOURNAL).unlink()
    os.replace(path, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
