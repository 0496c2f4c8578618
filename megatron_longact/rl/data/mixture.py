"""Several environments as one: training tasks mixed by weight, held-out tasks side by side."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from megatron_longact.rl.data.environment import Environment, Score, Task, TaskSource, Turn, turns


@dataclass(frozen=True)
class _Routed:
    """A reference with the environment that can judge with it."""

    part: int
    reference: Any


class Mixture:
    """Environments as one.

    training: sources with their weights; heldout: environments whose held-out tasks are used; tasks_per_step: training
    tasks that a step plans. Raises ValueError without a source, or for a weight that is not positive and finite.
    """

    def __init__(
        self,
        training: Sequence[tuple[TaskSource, float]],
        *,
        heldout: Sequence[Environment],
        tasks_per_step: int,
    ) -> None:
        if not training:
            raise ValueError("a mixture of no training source: give one")
        self._sources = [source for source, _ in training]
        self._blend = Blend([weight for _, weight in training])
        self._heldout = list(heldout)
        self._parts: list[Environment] = [*self._sources, *self._heldout]
        self._tasks_per_step = tasks_per_step
        self._lengths = tuple(sorted({length for part in self._heldout for length in part.heldout_lengths}))

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        """See `Environment`."""
        wanted = turns(step, first=first, count=count, tasks_per_step=self._tasks_per_step)
        return [self.task(turn) for turn in wanted]

    def task(self, turn: Turn) -> Task:
        """See `TaskSource`."""
        part, number = self._blend[turn.number]
        return self._routed(part, self._sources[part].task(replace(turn, number=number)))

    @property
    def heldout_lengths(self) -> tuple[int, ...]:
        """See `Environment`."""
        return self._lengths

    @property
    def longest_prompt(self) -> int:
        """See `Environment`."""
        return max(part.longest_prompt for part in self._parts)

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """See `Environment`; the environments that have this length take turns."""
        offered = [
            [self._routed(len(self._sources) + i, task) for task in part.heldout_tasks(length, count=count)]
            for i, part in enumerate(self._heldout)
            if length in part.heldout_lengths
        ]
        in_turns = chain.from_iterable(zip_longest(*offered))
        return [task for task in in_turns if task is not None][:count]

    def score(self, task: Task, response: str) -> Score:
        """The score of the environment that the task came from."""
        routed: _Routed = task.reference
        return self._parts[routed.part].score(replace(task, reference=routed.reference), response)

    def _routed(self, part: int, task: Task) -> Task:
        return replace(task, reference=_Routed(part, task.reference))


class Blend:
    """An endless sequence of parts in which each part's share is its weight, as exactly as whole numbers allow.

    `blend[t]` is (part, how many of that part come before t): the part that is furthest behind its share, the lower
    index first. A function of the weights alone; what was computed is kept.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"a weight is {weight}; it must be positive and finite")
        self._shares = [weight / math.fsum(weights) for weight in weights]
        self._counts = [0] * len(weights)
        self._parts, self._numbers = array("q"), array("q")

    def __getitem__(self, t: int) -> tuple[int, int]:
        while len(self._parts) <= t:
            self._append()
        return self._parts[t], self._numbers[t]

    def _append(self) -> None:
        done = len(self._parts) + 1
        behind = [share * done - count for share, count in zip(self._shares, self._counts, strict=True)]
        part = behind.index(max(behind))
        self._parts.append(part)
        self._numbers.append(self._counts[part])
        self._counts[part] += 1
