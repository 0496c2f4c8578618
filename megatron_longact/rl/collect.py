"""What is asked of the model between optimizer steps: rollout batches to train on, and held-out tasks.

A batch is tasks, responses, rewards, advantages, and log-probs by the trainer's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_longact.generation.engine import Prompt, RolloutEngine
from megatron_longact.rl.answers import AnswerLog
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.data.environment import Task
from megatron_longact.rl.heldout import Judge, evaluate_heldout
from megatron_longact.rl.log_probs import TrainerLogProbs
from megatron_longact.rl.objectives.advantages import group_relative_advantages, overlong_penalty
from megatron_longact.rl.objectives.importance_weights import truncated_importance_weights
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES
from megatron_longact.rl.reference import ReferenceWeights


class Collector:
    """Asks the model as it is; called by all ranks, between optimizer steps."""

    def __init__(
        self,
        config: RLConfig,
        *,
        engine: RolloutEngine,
        judge: Judge,
        trainer_log_probs: TrainerLogProbs,
        reference: ReferenceWeights | None,
        prose: Callable[[], float] | None = None,
        answers: AnswerLog | None = None,
    ) -> None:
        """prose: the perplexity of text that has nothing to do with the tasks, looked at beside the held-out ones.

        answers: is shown all that the model says.
        """
        self._config = config
        self._engine = engine
        self._judge = judge
        self._trainer_log_probs = trainer_log_probs
        self._reference = reference
        self._prose = prose
        self._answers = answers

    def rollouts(self, step: int) -> RolloutBatch:
        """Responses, rewards and advantages of a rollout step.

        With dynamic sampling, groups whose rewards are all equal are thrown out and more prompts are
        sampled until the batch is full. Raises ValueError if `max_sampling_rounds` do not fill it.
        """
        config = self._config
        kept: list[RolloutBatch] = []
        sampled = thrown_out = without_spread = 0
        for round_ in range(config.sampling_rounds):
            tasks, made, spread = self._sample(step, first=round_ * config.prompts_per_step)
            wanted = spread if config.dynamic_sampling else torch.ones_like(spread)
            if self._answers is not None:
                used = wanted & (wanted.cumsum(0) + sampled - thrown_out <= config.prompts_per_step)
                self._answers.rollouts(made, tasks, first=sampled, used=used)
            kept.append(made.select(wanted.repeat_interleave(config.group_size).nonzero().flatten().tolist()))
            sampled += len(spread)
            thrown_out += int((~wanted).sum())
            without_spread += int((~spread).sum())
            if sum(map(len, kept)) >= config.responses_per_step:
                break
        else:
            raise ValueError(_not_full(config, step=step, sampled=sampled, kept=sampled - thrown_out))
        batch = RolloutBatch.concatenate(kept).select(list(range(config.responses_per_step)))
        batch.counts = {
            "groups_sampled": sampled,
            "groups_without_spread": without_spread,
            "groups_thrown_out": sampled - config.prompts_per_step,
        }
        return batch

    def _sample(self, step: int, *, first: int) -> tuple[list[Task], RolloutBatch, Tensor]:
        """The tasks `first`, `first + 1`, ... of a rollout step, and a group of responses to each.

        With them, bool [groups], whether the tasks' own rewards differ in a group; what is taken off for length does
        not count there.
        """
        config = self._config
        group = config.group_size
        tasks = self._judge.environment.training_tasks(step, count=config.prompts_per_step, first=first)
        prompts = [Prompt(t.prompt, first + i, j) for i, t in enumerate(tasks) for j in range(group)]
        rollouts = self._engine.generate(prompts, replace(config.sampling, step=step))
        scores = self._judge.score([task for task in tasks for _ in range(group)], rollouts)
        rewards = torch.tensor([score.reward for score in scores], dtype=torch.float32)
        by_group = rewards.view(-1, group)
        spread = by_group.amax(1) != by_group.amin(1)
        if config.overlong_buffer_length:
            rewards = rewards + overlong_penalty(
                rollouts.lengths,
                max_response_length=config.max_response_length,
                buffer_length=config.overlong_buffer_length,
                penalty_factor=config.overlong_penalty_factor,
            )
        batch = RolloutBatch(
            step=step,
            prompts=[prompt.tokens for prompt in prompts],
            responses=rollouts.tokens,
            lengths=rollouts.lengths,
            rollout_log_probs=rollouts.log_probs,
            rewards=rewards,
            correct=torch.tensor([score.correct for score in scores]),
            finished=rollouts.finished,
            advantages=group_relative_advantages(
                rewards,
                torch.tensor([prompt.index for prompt in prompts]),
                normalize_std=config.normalize_advantages,
            ),
        )
        return tasks, batch, spread

    def add_log_probs(self, batch: RolloutBatch) -> None:
        """Set `old_log_probs`, and what rests on them, and `ref_log_probs` if there is a reference."""
        batch.old_log_probs = self._trainer_log_probs.before_updates(batch, first_too=self._needs_all_log_probs)
        self._add_what_is_missing(batch)

    def complete(self, batch: RolloutBatch) -> None:
        """Fit a batch out of a checkpoint to these flags: add what it lacks, drop what none asks for, keep the rest.

        Old log-probs are unknown before its first step alone, and then the model is still the one that sampled it.
        """
        if self._needs_all_log_probs and not batch.knows_old_log_probs(range(len(batch))):
            old, now = batch.old_log_probs, self._trainer_log_probs.of_batch(batch)
            batch.old_log_probs = now if old is None else torch.where(old.isnan(), now, old)
        if self._config.importance_level is None:
            batch.importance_weights = None
        if self._reference is None:
            batch.ref_log_probs = None
        self._add_what_is_missing(batch)

    @property
    def _needs_all_log_probs(self) -> bool:
        selects = POLICY_LOSSES[self._config.policy_loss].selection is not None
        return self._config.importance_level is not None or selects

    def _add_what_is_missing(self, batch: RolloutBatch) -> None:
        if self._reference is not None and batch.ref_log_probs is None:
            with self._reference.swapped_in():
                batch.ref_log_probs = self._trainer_log_probs.of_batch(batch)
        if self._config.importance_level is not None and batch.importance_weights is None:
            assert batch.old_log_probs is not None
            batch.importance_weights = truncated_importance_weights(
                batch.old_log_probs,
                batch.rollout_log_probs,
                batch.response_mask,
                level=self._config.importance_level,
                threshold=self._config.importance_threshold,
            )

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out tasks."""
        return bool(self._judge.environment.heldout_lengths)

    def heldout(self, *, iteration: int) -> dict[str, Any]:
        """The row of `evaluate_heldout`, with the `perplexity` of prose if there is any."""
        config = self._config
        row = evaluate_heldout(
            self._engine,
            self._judge,
            config,
            iteration=iteration,
            pass_at=config.data.pass_at,
            show=None if self._answers is None else self._answers.heldout,
        )
        return row if self._prose is None else row | {"perplexity": self._prose()}


def _not_full(config: RLConfig, *, step: int, sampled: int, kept: int) -> str:
    return (
        f"dynamic sampling: of {sampled} groups sampled in rollout step {step} only {kept} had rewards that differ, "
        f"and --grpo-prompts-per-step is {config.prompts_per_step}; the tasks are too easy or too hard for the model: "
        "mix others in, raise --grpo-group-size or --max-sampling-rounds, or leave "
        "--grpo-filter-groups-with-same-reward off"
    )
