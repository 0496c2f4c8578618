"""Held-out accuracy by context length, by greedy decoding with the rollout engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_longact.rl.arguments import GRPOConfig
from megatron_longact.rl.environment import Environment, Score, Task
from megatron_longact.rl.rollout import Prompt, RolloutEngine, Rollouts

Detokenize = Callable[[list[int]], str]


@dataclass(frozen=True)
class Judge:
    """Turns responses into scores: text without the end-of-text token, judged by the environment."""

    environment: Environment
    detokenize: Detokenize

    def score(self, tasks: list[Task], rollouts: Rollouts) -> list[Score]:
        """Scores in the order of the rollouts; tasks[i] is that of response i.

        Raises RuntimeError that names the task if a reward raises.
        """
        return [self._score(i, task, rollouts) for i, task in enumerate(tasks)]

    def _score(self, i: int, task: Task, rollouts: Rollouts) -> Score:
        length = int(rollouts.lengths[i]) - int(rollouts.finished[i])
        response = self.detokenize(rollouts.tokens[i, :length].tolist())
        try:
            return self.environment.score(task, response)
        except Exception as error:
            raise RuntimeError(
                f"the reward of a {task.name!r} task (response {i} of the batch) raised on "
                f"{response!r} with reference {task.reference!r}"
            ) from error


def evaluate_heldout(engine: RolloutEngine, judge: Judge, config: GRPOConfig, *, iteration: int) -> dict[str, Any]:
    """One row: `iteration`, `accuracy` and `reward` over all prompts, `accuracy_by_length`, `prompts`.

    Called by all ranks; the same row on each.
    """
    lengths = config.heldout_context_lengths
    tasks = [
        task for length in lengths for task in judge.environment.heldout_tasks(length, count=config.heldout_prompts)
    ]
    prompts = [Prompt(task.prompt, index=i) for i, task in enumerate(tasks)]
    rollouts = engine.generate(prompts, replace(config.sampling, greedy=True))
    scores = judge.score(tasks, rollouts)
    correct = [score.correct for score in scores]
    by_length = {
        str(length): _mean(correct[i * config.heldout_prompts : (i + 1) * config.heldout_prompts])
        for i, length in enumerate(lengths)
    }
    return {
        "iteration": iteration,
        "accuracy": _mean(correct),
        "reward": _mean([score.reward for score in scores]),
        "accuracy_by_length": by_length,
        "prompts": len(tasks),
    }


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)
