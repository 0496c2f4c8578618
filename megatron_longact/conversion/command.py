"""What the conversion tools show: how far they are, and how they end."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} GB [{elapsed}<{remaining}, {rate_noinv_fmt}]"


class Throughput:
    """A bar on stderr, in GB and GB/s; `done` says at the end how much went through, how fast."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._bar = tqdm(  # disable=None: only on a terminal
            total=total_bytes / 1e9, unit=" GB", desc=what, bar_format=_BAR, file=sys.stderr, disable=None
        )
        self._start, self._bytes, self._skipped = time.perf_counter(), 0, 0

    def add(self, nbytes: int) -> None:
        """So many bytes more are written."""
        self._bytes += nbytes
        self._bar.update(nbytes / 1e9)

    def skip(self, nbytes: int) -> None:
        """So many bytes were written by an earlier start."""
        self._skipped += nbytes
        self._bar.update(nbytes / 1e9)

    @property
    def done(self) -> str:
        """GB, seconds and GB/s so far."""
        seconds = time.perf_counter() - self._start
        taken_up = f", {self._skipped / 1e9:.3g} GB were there already" if self._skipped else ""
        return f"{self._bytes / 1e9:.3g} GB in {seconds:.1f} s, {self._bytes / 1e9 / seconds:.2f} GB/s{taken_up}"

    def __enter__(self) -> "Throughput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def run(action: Callable[[], str]) -> int:
    """Print what `action` returns; exit status 0, 1 with one line for a `ValueError`, 130 when interrupted."""
    tool = Path(sys.argv[0]).name
    try:
        print(action())
    except ValueError as error:
        print(f"{tool}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0
