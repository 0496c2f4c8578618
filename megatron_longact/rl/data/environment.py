"""Where prompts come from and how responses are judged."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from megatron_longact.rl.data.curriculum import Curriculum
from megatron_longact.rl.data.datasets import Dataset
from megatron_longact.rl.data.rewards import find_reward, finite_reward
from megatron_longact.tasks import needle as tasks
from megatron_longact.tasks.needle import NeedleGenerator, Tokenizer

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Task:
    """One prompt with what judges its responses.

    name: the kind of task, or the data set; reference: the environment's own business; source: `file:line` of a
    prompt that comes from a file; metadata: what else stands there; answer: the right one, for people to read.
    """

    prompt: tuple[int, ...]
    name: str
    reference: Any
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    answer: Any = field(default=None, hash=False)


@dataclass(frozen=True)
class Score:
    """Reward of a response, and whether it counts as right in the accuracy."""

    reward: float
    correct: bool


class Environment(Protocol):
    """A pure function of its arguments, so that all ranks and a resumed run see the same."""

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        """The tasks `first` to `first + count` of a rollout step; a task does not depend on the range asked for."""
        ...

    @property
    def heldout_lengths(self) -> tuple[int, ...]:
        """The context lengths that there are held-out tasks of."""
        ...

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that there is, to train on or held out, or a little more."""
        ...

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """The first `count` held-out tasks of a context length, or all if there are fewer; the same at each call."""
        ...

    def score(self, task: Task, response: str) -> Score:
        """Judge a response."""
        ...


@dataclass(frozen=True)
class Turn:
    """Which of its tasks a source is asked for.

    A run plans so many tasks a step. Those that a step asks for beyond them (dynamic sampling) are further rounds of
    the same plan, so that they change nothing in the planned tasks of later steps.

    step: the rollout step; index: the task's place in the step, over all sources; number: how many planned tasks of
    this source come before it, from step 0 on; round: 0 for planned tasks, then 1, 2, ...
    """

    step: int
    index: int
    number: int
    round: int


class TaskSource(Environment, Protocol):
    """An environment that can be part of a `Mixture`."""

    def task(self, turn: Turn) -> Task:
        """One training task, a pure function of the turn."""
        ...


def turns(step: int, *, first: int, count: int, tasks_per_step: int) -> Iterator[Turn]:
    """The turns of a step's tasks `first` to `first + count` if one source makes all tasks."""
    for index in range(first, first + count):
        round_, place = divmod(index, tasks_per_step)
        yield Turn(step, index, number=step * tasks_per_step + place, round=round_)


class NeedleEnvironment:
    """RULER's needle tasks (`megatron_longact.tasks.needle`).

    lengths: prompt lengths in tokens, drawn for each training task out of those that the curriculum allows at its
    step; none: the held-out ones. seed: of the training tasks. Raises ValueError for a length that cannot hold a
    task, and for a curriculum that allows no length, when it is made.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        names: Sequence[str],
        lengths: Sequence[int],
        heldout_lengths: Sequence[int],
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        chosen = tuple(names) or tuple(tasks.NEEDLE_TASKS)
        self._curriculum = curriculum or Curriculum()
        drawn = lengths or heldout_lengths
        self._training = {
            limit: NeedleGenerator(tokenizer, tasks=chosen, lengths=allowed_lengths(drawn, limit), seed=seed)
            for limit in self._curriculum.limits
        }
        self._heldout = NeedleGenerator(tokenizer, tasks=chosen, lengths=heldout_lengths, split="heldout", seed=seed)
        for generator in (*self._training.values(), self._heldout):
            for name in chosen:
                generator.sample(0, 0, task=name, length=min(generator.lengths))

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        """See `Environment`."""
        return [self._task(step, i) for i in range(first, first + count)]

    def task(self, turn: Turn) -> Task:
        """See `TaskSource`."""
        return self._task(turn.step, turn.index)

    @property
    def heldout_lengths(self) -> tuple[int, ...]:
        """See `Environment`."""
        return self._heldout.lengths

    @property
    def longest_prompt(self) -> int:
        """See `Environment`."""
        drawn = [length for generator in self._training.values() for length in generator.lengths]
        return max([*drawn, *self._heldout.lengths])

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """See `Environment`; tasks take turns, so each has its share at every length."""
        kinds = self._heldout.tasks
        return [_needle(self._heldout.sample(0, i, task=kinds[i % len(kinds)], length=length)) for i in range(count)]

    def score(self, task: Task, response: str) -> Score:
        """Reward: share of the values found; right: exactly the values asked for."""
        return Score(
            reward=tasks.reward(response, task.reference),
            correct=tasks.exact_match(response, task.reference),
        )

    def _task(self, step: int, index: int) -> Task:
        return _needle(self._training[self._curriculum.limit(step)].sample(step, index))


@dataclass(frozen=True)
class _Question:
    """What a data set's reward is called with."""

    prompt: str
    reference: Any
    reward: str


class DatasetEnvironment:
    """Tasks from a JSONL data set: for training in a random order, as held-out tasks by length.

    Each epoch of planned tasks goes once through the prompts that the curriculum allows, in an order that is a
    function of the seed, the file's name and the epoch. Further rounds of a step (`Turn`) take other places of the
    same order. Held-out tasks keep the order of the file. Their context length is the smallest of `length_edges` that
    the prompt fits in; without edges the line's own `length`, and if it has none, the next power of two.

    correct_reward: responses with at least this reward count as right. Raises ValueError, when it is made, for a stage
    of the curriculum that allows no prompt.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        tasks_per_step: int = 1,
        curriculum: Curriculum | None = None,
        length_edges: Sequence[int] = (),
        correct_reward: float = 1.0,
    ) -> None:
        self._dataset = dataset
        self._key = (seed, zlib.crc32(dataset.path.name.encode()))
        self._tasks_per_step = tasks_per_step
        self._curriculum = curriculum or Curriculum()
        self._length_edges = tuple(length_edges)
        self._correct_reward = correct_reward
        self._allowed = {limit: _allowed_examples(dataset, limit) for limit in self._curriculum.limits}

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        """See `Environment`."""
        wanted = turns(step, first=first, count=count, tasks_per_step=self._tasks_per_step)
        return [self.task(turn) for turn in wanted]

    def task(self, turn: Turn) -> Task:
        """See `TaskSource`."""
        allowed = self._allowed[self._curriculum.limit(turn.step)]
        return self._task(int(allowed[shuffled(turn.number, size=len(allowed), round=turn.round, key=self._key)]))

    @property
    def heldout_lengths(self) -> tuple[int, ...]:
        """See `Environment`; ValueError for a prompt that is longer than the last edge."""
        return tuple(sorted(self._by_length))

    @property
    def longest_prompt(self) -> int:
        """See `Environment`; also of prompts that the curriculum never allows."""
        return int(self._dataset.lengths.max())

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """See `Environment`."""
        return [self._task(index) for index in self._by_length[length][:count]]

    def score(self, task: Task, response: str) -> Score:
        """The reward that the task's line names; right: at least `correct_reward`."""
        question: _Question = task.reference
        value = find_reward(question.reward)(question.prompt, response, question.reference)
        reward = finite_reward(value, name=question.reward)
        return Score(reward=reward, correct=reward >= self._correct_reward)

    @cached_property
    def _by_length(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for index in range(len(self._dataset)):
            groups.setdefault(self._context_length(index), []).append(index)
        return groups

    def _context_length(self, index: int) -> int:
        tokens = int(self._dataset.lengths[index])
        if not self._length_edges:
            return self._dataset.stated_length(index) or 1 << (tokens - 1).bit_length()
        for edge in self._length_edges:
            if tokens <= edge:
                return edge
        raise ValueError(
            f"{self._dataset.source(index)}: the prompt has {tokens} tokens, more than the last of the held-out "
            f"lengths {self._length_edges}"
        )

    def _task(self, index: int) -> Task:
        example = self._dataset[index]
        return Task(
            prompt=example.tokens,
            name=self._dataset.path.stem,
            reference=_Question(example.text, example.reference, example.reward),
            answer=example.reference,
            source=example.source,
            metadata=example.metadata,
        )


def shuffled(number: int, *, size: int, round: int, key: tuple[int, ...]) -> int:
    """Which of `size` examples the `number`-th draw takes, in epochs without repetition.

    Later rounds go through the same order from another place, by golden sections, so that one step draws an example
    twice only if it takes a large share of all of them.
    """
    epoch, place = divmod(number, size)
    offset = int(size * (round * _GOLDEN % 1))
    return int(_order(size, *key, epoch)[(place + offset) % size])


@lru_cache(maxsize=64)
def _order(size: int, *key: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).permutation(size)


def allowed_lengths(lengths: Sequence[int], limit: int | None) -> list[int]:
    """Those within the curriculum's limit; ValueError if there are none of them."""
    allowed = [length for length in lengths if limit is None or length <= limit]
    if lengths and not allowed:
        raise ValueError(
            f"--curriculum allows at most {limit} tokens, but the shortest of the lengths is {min(lengths)}"
        )
    return allowed


def _allowed_examples(dataset: Dataset, limit: int | None) -> np.ndarray:
    if limit is None:
        return np.arange(len(dataset))
    allowed = np.flatnonzero(dataset.lengths <= limit)
    if not len(allowed):
        raise ValueError(
            f"--curriculum allows at most {limit} tokens, but the shortest prompt of {dataset.path} has "
            f"{dataset.lengths.min()}"
        )
    return allowed


def _needle(sample: tasks.NeedleSample) -> Task:
    return Task(sample.prompt_ids, sample.task, reference=sample.references, answer=sample.references)
