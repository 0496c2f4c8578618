"""What LongAct came to in a launched program: one line when it ends."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from megatron.training import training
from torch import Tensor

from megatron_longact.longact import LongAct
from megatron_longact.selection import QK

logger = logging.getLogger("megatron_longact")


class RunSummary:
    """Counts, while a program runs, which rows were updated, and whose time the optimizer steps are.

    On the device, and without waiting for it: the union of the masks is looked at when a mask is another one.
    """

    def __init__(self, longact: LongAct) -> None:
        self._longact, self._steps, self._step_s = longact, 0, 0.0
        self._updates, self._time_before = longact.state.updates, longact.time_s()
        self._seen: QK | None = None
        self._ever: QK | None = None

    def after_step(self, seconds: float) -> None:
        """Take in an optimizer step that took so long."""
        before, self._updates = self._updates, self._longact.state.updates
        self._steps += 1
        self._step_s += seconds
        active = self._longact.active
        if self._updates != before and active is not self._seen:  # not skipped
            self._seen = active
            self._ever = active if self._ever is None else _union(self._ever, active)

    def line(self) -> str | None:
        """What it came to; None where there was no step. Waits for the device once."""
        if not self._steps:
            return None
        counted = "no mask was chosen"
        if self._ever is not None and self._longact.state.masks is not None:
            rows, updated = sum(part.numel() for part in self._ever), sum(int(part.sum()) for part in self._ever)
            counted = (
                f"{updated:,} of {rows:,} Q/K rows were updated at some step, {rows - updated:,} were frozen in all"
            )
        share = (self._longact.time_s() - self._time_before) / self._step_s
        took = f"LongAct took {share:.1%} of the steps' time on rank 0"
        return f"LongAct ends at update {self._longact.state.updates}: in {self._steps} steps {counted}; {took}"


def _union(a: QK, b: QK) -> QK:
    parts: list[Tensor] = [old | new for old, new in zip(a, b, strict=True)]
    return QK(*parts)


@contextmanager
def said_at_the_end(instances: Sequence[LongAct]) -> Iterator[None]:
    """While this is open, steps of `megatron.training` are counted; on leaving, rank 0 logs a line for each LongAct."""
    summaries: dict[int, RunSummary] = {}
    original = training.train_step
    training.train_step = _watched(original, instances, summaries)
    try:
        yield
        _say(summaries)
    except SystemExit:
        _say(summaries)
        raise
    finally:
        training.train_step = original


def _watched(
    original: Callable[..., Any], instances: Sequence[LongAct], summaries: dict[int, RunSummary]
) -> Callable[..., Any]:
    @wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        for instance in instances:
            if id(instance) not in summaries:
                summaries[id(instance)] = RunSummary(instance)
        begun = time.perf_counter()
        result = original(*args, **kwargs)
        for summary in summaries.values():
            summary.after_step(time.perf_counter() - begun)
        return result

    return train_step


def _say(summaries: dict[int, RunSummary]) -> None:
    for summary in summaries.values():
        line = summary.line()
        if line and os.environ.get("RANK", "0") == "0":  # the program may have left its process group
            logger.info(line)
