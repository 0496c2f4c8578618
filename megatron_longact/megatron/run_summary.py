"""What LongAct came to in a launched program: one line when it ends."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.training import training

from megatron_longact.longact import LongAct

logger = logging.getLogger("megatron_longact")


class RunSummary:
    """Counts, while a program runs, which rows were updated, and whose time the optimizer steps are.

    On the device, and without waiting for it.
    """

    def __init__(self, longact: LongAct) -> None:
        self._longact, self._steps, self._step_s = longact, 0, 0.0
        self._updates_before, self._time_before = longact.state.updates, longact.time_s()

    def after_step(self, seconds: float) -> None:
        """Take in an optimizer step that took so long."""
        self._steps += 1
        self._step_s += seconds

    def line(self) -> str | None:
        """What it came to; None where there was no step. Waits for the device once."""
        if not self._steps:
            return None
        counted, state = "no mask was chosen", self._longact.state
        if state.masks is not None and state.history.last_active is not None:
            last = torch.cat([part.flatten() for part in state.history.last_active])
            rows, updated = last.numel(), int((last > self._updates_before).sum())
            counted = (
                f"{updated:,} of {rows:,} Q/K rows were updated at some step, {rows - updated:,} were frozen in all"
            )
        share = (self._longact.time_s() - self._time_before) / self._step_s
        took = f"LongAct took {share:.1%} of the steps' time on rank 0"
        return f"LongAct ends at update {state.updates}: in {self._steps} steps {counted}; {took}"


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
