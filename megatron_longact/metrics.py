"""What LongAct reports: the names of its scalars and of its ranges in a profile, and a clock for its own work."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

from megatron_longact.selection import QK

ACTIVE_FRACTION_Q = "longact/active_fraction_q"
ACTIVE_FRACTION_K = "longact/active_fraction_k"
MASK_JACCARD = "longact/mask_jaccard"
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


class Stopwatch:
    """Adds up the time spent in `with stopwatch.part(name)` blocks, on the device's own clock where there is one.

    On a GPU events are recorded and read only in `read`, so that no step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def part(self, name: str) -> "Part":
        """A block of the work, to be entered as often as one likes; `name` is its range in a profile."""
        return Part(self, name)

    def now(self) -> Any:
        """A point in time, for `add`."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begun: Any, ended: Any) -> None:
        """Count the time between two points."""
        if self.cuda:
            self._spans.append((begun, ended))
        else:
            self._seconds += ended - begun

    def read(self) -> float:
        """Seconds since the last reading; waits for the device once."""
        if self._spans:
            self._spans[-1][1].synchronize()
            self._seconds += sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1000
            self._spans.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Part:
    """One named part of a stopwatch's work; not to be entered while it is open."""

    def __init__(self, stopwatch: Stopwatch, name: str) -> None:
        self._stopwatch, self._name = stopwatch, name
        self._range: record_function | None = None
        self._begun: Any = None

    def __enter__(self) -> None:
        # a range costs more than many a part of ours, also when nobody records it
        if profiler._is_profiler_enabled:
            self._range = record_function(self._name)
            self._range.__enter__()
        if self._stopwatch.cuda:
            torch.cuda.nvtx.range_push(self._name)
        self._begun = self._stopwatch.now()

    def __exit__(self, *exception: Any) -> None:
        self._stopwatch.add(self._begun, self._stopwatch.now())
        if self._stopwatch.cuda:
            torch.cuda.nvtx.range_pop()
        if self._range is not None:
            self._range.__exit__(*exception)
            self._range = None


def jaccard(new: QK, old: QK) -> float:
    """Overlap of two masks over Q and K together: size of the intersection over that of the union."""
    both = sum(int((a & b).sum()) for a, b in zip(new, old, strict=True))
    either = sum(int((a | b).sum()) for a, b in zip(new, old, strict=True))
    return both / either


def active_fraction(mask: Tensor) -> float:
    """Share of True in a mask."""
    return float(mask.float().mean())
