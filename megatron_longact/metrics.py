"""What LongAct reports: the names of its scalars, and a clock for its own work."""

import time
from typing import Any

import torch
from torch import Tensor

from megatron_longact.selection import QK

ACTIVE_FRACTION_Q = "longact/active_fraction_q"
ACTIVE_FRACTION_K = "longact/active_fraction_k"
MASK_JACCARD = "longact/mask_jaccard"
MASKED_GRAD_NORM_SHARE = "longact/masked_grad_norm_share"
TIME = "longact/time_s"
REFRESHES = "longact/refreshes"
REJECTED_REFRESHES = "longact/rejected_refreshes"


class Stopwatch:
    """Adds up the time spent in `with` blocks, on the device's own clock where there is one.

    On a GPU events are recorded and read only in `read`, so that no step waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._begun: Any = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> "Stopwatch":
        if self._cuda:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._spans.append((self._begun, ended))
        else:
            self._seconds += time.perf_counter() - self._begun

    def read(self) -> float:
        """Seconds since the last reading; waits for the device once."""
        if self._spans:
            self._spans[-1][1].synchronize()
            self._seconds += sum(begun.elapsed_time(ended) for begun, ended in self._spans) / 1000
            self._spans.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def jaccard(new: QK, old: QK) -> float:
    """Overlap of two masks over Q and K together: size of the intersection over that of the union."""
    both = sum(int((a & b).sum()) for a, b in zip(new, old, strict=True))
    either = sum(int((a | b).sum()) for a, b in zip(new, old, strict=True))
    return both / either


def active_fraction(mask: Tensor) -> float:
    """Share of True in a mask."""
    return float(mask.float().mean())
