"""Where prompts come from and how responses are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_longact.rl import tasks
from megatron_longact.rl.tasks import NeedleGenerator, Tokenizer

HELDOUT_SEED = 20_260_101
"""Of every run's held-out tasks, so that runs with other seeds are measured on the same ones."""


@dataclass(frozen=True)
class Task:
    """One prompt with what judges its responses; `reference` is the environment's own business."""

    prompt: tuple[int, ...]
    name: str
    reference: Any


@dataclass(frozen=True)
class Score:
    """Reward of a response, and whether it counts as right in the accuracy."""

    reward: float
    correct: bool


class Environment(Protocol):
    """A pure function of its arguments, so that all ranks and a resumed run see the same."""

    def training_tasks(self, step: int, *, count: int) -> list[Task]:
        """The tasks of a rollout step."""
        ...

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """The first `count` held-out tasks of a context length, the same at each call."""
        ...

    def score(self, task: Task, response: str) -> Score:
        """Judge a response."""
        ...


class NeedleEnvironment:
    """RULER's needle tasks (`megatron_longact.rl.tasks`).

    lengths: prompt lengths in tokens, drawn for each training task; seed: of the training tasks. Raises
    ValueError for a length that cannot hold a task, when it is made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        names: Sequence[str],
        lengths: Sequence[int],
        heldout_lengths: Sequence[int],
        seed: int,
    ) -> None:
        chosen = tuple(names) or tuple(tasks.NEEDLE_TASKS)
        self._training = NeedleGenerator(tokenizer, tasks=chosen, lengths=lengths, seed=seed)
        self._heldout = NeedleGenerator(tokenizer, tasks=chosen, lengths=heldout_lengths, split="heldout", seed=seed)
        for generator in (self._training, self._heldout):
            for name in chosen:
                generator.sample(0, 0, task=name, length=min(generator.lengths))

    def training_tasks(self, step: int, *, count: int) -> list[Task]:
        """See `Environment`."""
        return [_task(self._training.sample(step, i)) for i in range(count)]

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """See `Environment`; tasks take turns, so each has its share at every length."""
        kinds = self._heldout.tasks
        return [_task(self._heldout.sample(0, i, task=kinds[i % len(kinds)], length=length)) for i in range(count)]

    def score(self, task: Task, response: str) -> Score:
        """Reward: share of the values found; right: exactly the values asked for."""
        return Score(
            reward=tasks.reward(response, task.reference),
            correct=tasks.exact_match(response, task.reference),
        )


def _task(sample: tasks.Sample) -> Task:
    return Task(prompt=sample.prompt_ids, name=sample.task, reference=sample.references)
