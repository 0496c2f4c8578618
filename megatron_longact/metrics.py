"""What LongAct reports: the names of its scalars and of its ranges in a profile, and a clock for its own work."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

from megatron_longact.mask_history import MaskHistory, overlap
from megatron_longact.selection import QK, ModelGroups

ACTIVE_FRACTION_Q = "longact/active_fraction_q"
ACTIVE_FRACTION_K = "longact/active_fraction_k"
MASK_JACCARD = "longact/mask_jaccard"
MASK_JACCARD_FIRST = "longact/mask_jaccard_first"
EVER_ACTIVE_FRACTION = "longact/ever_active_fraction"
MASKED_GRAD_NORM_SHARE = "longact/masked_grad_norm_share"
TIME = "longact/time_s"
REFRESHES = "longact/refreshes"
REJECTED_REFRESHES = "longact/rejected_refreshes"


# Ranges of a profile (torch.profiler and, on a GPU, NVTX); what is in them is what longact/time_s adds up.
CAPTURE = "longact/capture"
REFRESH = "longact/refresh"
MASK = "longact/mask"
FREEZE = "longact/freeze"
RESTORE = "longact/restore"
RANGES = (CAPTURE, REFRESH, MASK, FREEZE, RESTORE)


class Event(Protocol):
    """A point in time on a device's clock; `torch.cuda.Event` is one."""

    def record(self) -> Any:
        """Set it to when the work that was given to the device so far is done."""

    def query(self) -> bool:
        """Whether that is in the past."""

    def synchronize(self) -> Any:
        """Wait for it."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds to a later one."""


class HostEvent:
    """An `Event` of the host, which does what it is given at once."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        """See `Event`."""
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """See `Event`."""
        return True

    def synchronize(self) -> None:
        """See `Event`."""

    def elapsed_time(self, end_event: "HostEvent", /) -> float:
        """See `Event`."""
        return (end_event._seconds - self._seconds) * 1000


class Stopwatch:
    """Adds up the time spent in `with stopwatch.part(name)` blocks, on the device's own clock.

    On a GPU events are recorded, which no step waits for. Those whose time has come are added up and used again as
    others are recorded, so that it holds no more of them than the device is behind, whether or not anybody reads it.
    """

    def __init__(self, device: torch.device, event: Callable[[], Event] | None = None) -> None:
        """event: makes the events; None: those of the device."""
        self.cuda = device.type == "cuda"
        self._make = event or (partial(torch.cuda.Event, enable_timing=True) if self.cuda else HostEvent)
        self._milliseconds = self._read_before = 0.0
        self._running: deque[tuple[Event, Event]] = deque()
        self._free: list[Event] = []

    def part(self, name: str) -> "Part":
        """A block of the work, to be entered as often as one likes; `name` is its range in a profile."""
        return Part(self, name)

    def now(self) -> Event:
        """The present, for `add`."""
        event = self._free.pop() if self._free else self._make()
        event.record()
        return event

    def add(self, begun: Event, ended: Event) -> None:
        """Count the time between two points, which are the stopwatch's from then on."""
        self._running.append((begun, ended))
        while self._running and self._running[0][1].query():
            self._finish()

    def _finish(self) -> None:
        begun, ended = self._running.popleft()
        self._milliseconds += begun.elapsed_time(ended)
        self._free += (begun, ended)

    def total(self) -> float:
        """Seconds since it was made; waits for the device once."""
        if self._running:
            self._running[-1][1].synchronize()
        while self._running:
            self._finish()
        return self._milliseconds / 1000

    def read(self) -> float:
        """Seconds since the last reading; waits for the device once."""
        total, before = self.total(), self._read_before
        self._read_before = total
        return total - before


class Part:
    """One named part of a stopwatch's work; not to be entered while it is open."""

    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        self._stopwatch, self._name = stopwatch, name
        self._range: record_function | None = None
        self._begun: Event | None = None

    def __enter__(self) -> None:
        # a range costs more than many a part of ours, also when nobody records it
        if profiler._is_profiler_enabled:
            self._range = record_function(self._name)
            self._range.__enter__()
        if self._stopwatch.cuda:
            torch.cuda.nvtx.range_push(self._name)
        self._begun = self._stopwatch.now()

    def __exit__(self, *exception: Any) -> None:
        assert self._begun is not None
        self._stopwatch.add(self._begun, self._stopwatch.now())
        if self._stopwatch.cuda:
            torch.cuda.nvtx.range_pop()
        if self._range is not None:
            self._range.__exit__(*exception)
            self._range = None


def of_all_ranks(squares: Tensor | None, groups: ModelGroups, device: torch.device) -> Tensor:
    """The sum over all ranks of squared gradient norms, None where there was no step: fp32 [2]; collective."""
    total = torch.zeros(2, device=device)
    if squares is not None:
        total += squares
    for group in (groups.tp, groups.dp_cp, groups.pp):
        dist.all_reduce(total, group=group)
    return total


def read(*, active: QK, masks: QK | None, history: MaskHistory, squares: Tensor) -> dict[str, float | None]:
    """Scalars that were made on the device, read at once.

    active: rows that the last step could move; masks: those of its state, and their history; squares: squared gradient
    norms of the frozen rows and of all rows of Q and K, over all ranks, fp32 [2]. None for what there is nothing of.
    """
    nothing, ever = torch.zeros(2, device=squares.device), history.ever_active
    before = nothing if history.overlap is None else history.overlap
    first = nothing if masks is None or history.first is None else overlap(masks, history.first)
    rows = nothing if ever is None else overlap(ever, QK(*(torch.ones_like(part) for part in ever)))
    fractions = torch.stack([part.float().mean() for part in active])
    q, k, *pairs = torch.cat([fractions, before, first, rows, squares]).tolist()
    shares = [part / whole if whole > 0 else None for part, whole in zip(pairs[::2], pairs[1::2], strict=True)]
    return {
        ACTIVE_FRACTION_Q: q,
        ACTIVE_FRACTION_K: k,
        MASK_JACCARD: shares[0],
        MASK_JACCARD_FIRST: shares[1],
        EVER_ACTIVE_FRACTION: shares[2],
        MASKED_GRAD_NORM_SHARE: None if shares[3] is None else shares[3] ** 0.5,
    }
