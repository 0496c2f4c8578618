"""Held-out accuracy by context length, by greedy decoding with the rollout engine; pass@k if asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup

from megatron_longact.generation.engine import Prompt, RolloutEngine, Rollouts
from megatron_longact.generation.sampling import Sampling
from megatron_longact.rl.data.environment import Environment, Score, Task
from megatron_longact.rl.data.rewards import finite_reward
from megatron_longact.rl.pass_at_k import PassAtK, pass_at_k
from megatron_longact.tasks.intervals import wilson

Detokenize = Callable[[list[int]], str]

SAMPLING_STEP = 2**32 - 1
"""Chooses the random numbers of held-out samples: no rollout step has them, and each evaluation has the same."""


class HeldOutSettings(Protocol):
    """What an evaluation reads of a run's configuration."""

    @property
    def heldout_prompts(self) -> int:
        """Held-out prompts for each context length, at most."""
        ...

    @property
    def sampling(self) -> Sampling:
        """That of training; greedy answers keep its length, samples also its temperature, top-p and top-k."""
        ...


@dataclass(frozen=True)
class Judge:
    """Turns responses into scores: text without the end-of-text token, judged by the environment.

    group: ranks that share the work, each response judged by one of them and told to all, so that a reward that is
    slow or not deterministic costs once and means the same everywhere. None: this process judges all.
    """

    environment: Environment
    detokenize: Detokenize
    group: ProcessGroup | None = None

    def score(self, tasks: list[Task], rollouts: Rollouts) -> list[Score]:
        """Scores in the order of the rollouts; tasks[i] is that of response i. Called by all ranks of the group.

        Raises RuntimeError that names the sample, by file and line or by its place in the batch, if a reward raises or
        is not a finite number: on all ranks, chained to the original on the one where it happened.
        """
        if self.group is None or self.group.size() == 1:
            return [self._score(i, task, rollouts) for i, task in enumerate(tasks)]
        return self._score_together(tasks, rollouts, self.group)

    def _score_together(self, tasks: list[Task], rollouts: Rollouts, group: ProcessGroup) -> list[Score]:
        own: list[Score] = []
        failure: Exception | None = None
        try:
            for i in range(group.rank(), len(tasks), group.size()):
                own.append(self._score(i, tasks[i], rollouts))
        except Exception as error:  # the other ranks wait for this one below
            failure = error
        answers: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(answers, (own, None if failure is None else str(failure)), group=group)
        if failure is not None:
            raise failure
        for _, message in answers:
            if message is not None:
                raise RuntimeError(message)
        return [answers[i % group.size()][0][i // group.size()] for i in range(len(tasks))]

    def _score(self, i: int, task: Task, rollouts: Rollouts) -> Score:
        response = self.detokenize(rollouts.response(i))
        try:
            score = self.environment.score(task, response)
            score = Score(finite_reward(score.reward, name=task.name), bool(score.correct))
        except Exception as error:
            sample = task.source or f"reference {task.reference!r}"
            raise RuntimeError(
                f"the reward of a {task.name!r} task ({sample}, response {i} of the batch) raised "
                f"{type(error).__name__}: {error}; the response was {_shortened(response)}"
            ) from error
        return score


class Show(Protocol):
    """Is shown the greedy answers of an evaluation."""

    def __call__(
        self, tasks: Sequence[Task], rollouts: Rollouts, scores: Sequence[Score], *, lengths: Sequence[int]
    ) -> None:
        """lengths: the context length that each task counts at."""


def evaluate_heldout(
    engine: RolloutEngine,
    judge: Judge,
    config: HeldOutSettings,
    *,
    iteration: int,
    pass_at: PassAtK | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """One row: `iteration`, `accuracy` and `reward` over all prompts, `accuracy_by_length`, `prompts`.

    Also their 95 % intervals (`accuracy_interval`, `accuracy_interval_by_length`: Wilson's); the shares of answers that
    are cut off (`truncated_fraction`) and that are empty (`empty_fraction`); `reward_by_task`; and `rewards` and
    `correct`, of each prompt, length after length, in an order that is the same at each evaluation, so that runs of one
    seed can be compared prompt by prompt.
    With samples in `pass_at` also `pass_at_k` ({k: mean over all prompts}), its intervals over the prompts
    (`pass_at_k_interval`) and `pass_at_k_by_length` ({length: {k: mean}}), keys as strings. Called by all ranks; the
    same row on each.
    """
    environment, count = judge.environment, config.heldout_prompts
    groups = {length: environment.heldout_tasks(length, count=count) for length in environment.heldout_lengths}
    tasks = [task for group in groups.values() for task in group]
    lengths = [length for length, group in groups.items() for _ in group]
    prompts = [Prompt(task.prompt, index=i) for i, task in enumerate(tasks)]
    rollouts = engine.generate(prompts, replace(config.sampling, greedy=True))
    scores = judge.score(tasks, rollouts)
    if show is not None:
        show(tasks, rollouts, scores, lengths=lengths)
    correct = [score.correct for score in scores]
    row = {
        "iteration": iteration,
        "accuracy": _mean(correct),
        "reward": _mean([score.reward for score in scores]),
        "accuracy_by_length": (by_length := _means_by(lengths, correct)),
        "accuracy_interval": list(wilson(_mean(correct), len(correct))),
        "accuracy_interval_by_length": {n: list(wilson(by_length[n], len(groups[int(n)]))) for n in by_length},
        "reward_by_task": _means_by([task.name for task in tasks], [score.reward for score in scores]),
        "prompts": len(tasks),
        "prompts_by_length": {str(length): len(group) for length, group in groups.items()},
        "truncated_fraction": 1.0 - _mean(rollouts.finished.tolist()),
        "empty_fraction": _mean((rollouts.lengths == rollouts.finished).tolist()),
        "rewards": [score.reward for score in scores],
        "correct": correct,
    }
    if pass_at is None or not pass_at.samples:
        return row
    return row | _pass_at_k(engine, judge, config, tasks, lengths=lengths, pass_at=pass_at)


def heldout_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an `evaluate_heldout` row under the names that TensorBoard shows."""
    scalars = {f"heldout/accuracy@{length}": value for length, value in row["accuracy_by_length"].items()}
    if "perplexity" in row:
        scalars["heldout/perplexity"] = row["perplexity"]
    overall = ("accuracy", "reward", "truncated_fraction", "empty_fraction")
    scalars |= {f"heldout/{name}": row[name] for name in overall}
    scalars |= {f"heldout/pass@{k}": value for k, value in row.get("pass_at_k", {}).items()}
    for length, by_k in row.get("pass_at_k_by_length", {}).items():
        scalars |= {f"heldout/pass@{k}@{length}": value for k, value in by_k.items()}
    return scalars


def _pass_at_k(
    engine: RolloutEngine,
    judge: Judge,
    config: HeldOutSettings,
    tasks: Sequence[Task],
    *,
    lengths: Sequence[int],
    pass_at: PassAtK,
) -> dict[str, Any]:
    n = pass_at.samples
    prompts = [Prompt(task.prompt, index=i, sample=j) for i, task in enumerate(tasks) for j in range(n)]
    temperature = config.sampling.temperature if pass_at.temperature is None else pass_at.temperature
    rollouts = engine.generate(prompts, replace(config.sampling, temperature=temperature, step=SAMPLING_STEP))
    scores = judge.score([task for task in tasks for _ in range(n)], rollouts)
    right = [sum(score.correct for score in scores[i : i + n]) for i in range(0, len(scores), n)]
    overall: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    by_length: dict[str, dict[str, float]] = {str(length): {} for length in lengths}
    for k in pass_at.measured:
        values = [pass_at_k(samples=n, correct=c, k=k) for c in right]
        overall[str(k)] = _mean(values)
        intervals[str(k)] = list(wilson(_mean(values), len(values)))
        for length, mean in _means_by(lengths, values).items():
            by_length[length][str(k)] = mean
    return {"pass_at_k": overall, "pass_at_k_interval": intervals, "pass_at_k_by_length": by_length}


def _means_by(keys: Sequence[int] | Sequence[str], values: Sequence[Any]) -> dict[str, float]:
    groups: dict[str, list[Any]] = {}
    for key, value in zip(keys, values, strict=True):
        groups.setdefault(str(key), []).append(value)
    return {key: _mean(group) for key, group in groups.items()}


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values)


def _shortened(text: str, *, most: int = 200) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"
