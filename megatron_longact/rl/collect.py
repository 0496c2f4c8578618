"""One rollout step: tasks, responses, rewards, advantages, and log-probs by the trainer's forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_longact.rl.advantages import group_relative_advantages
from megatron_longact.rl.arguments import GRPOConfig
from megatron_longact.rl.batches import (
    MicroBatch,
    MicroBatchPlan,
    RolloutBatch,
    StepPlan,
    make_micro_batch,
    plan_steps,
)
from megatron_longact.rl.evaluation import Judge
from megatron_longact.rl.log_probs import ResponseScorer, score_responses
from megatron_longact.rl.reference import ReferenceWeights
from megatron_longact.rl.rollout import Prompt, RolloutEngine


@dataclass(frozen=True)
class BatchLayout:
    """How rollout batches become micro-batches on this replica."""

    config: GRPOConfig
    pad_token: int
    multiple_of: int
    dp_rank: int
    dp_size: int
    pp_size: int

    def plan(self, batch: RolloutBatch) -> list[StepPlan]:
        """The optimizer steps on a batch."""
        return plan_steps(
            batch,
            seed=self.config.seed,
            epochs=self.config.epochs,
            global_batch_size=self.config.global_batch_size,
            micro_batch_size=self.config.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
        )

    def micro_batch(self, batch: RolloutBatch, plan: MicroBatchPlan) -> MicroBatch:
        """A micro-batch; of one fixed length if pipeline stages must know it."""
        return make_micro_batch(
            batch,
            plan,
            pad_token=self.pad_token,
            multiple_of=self.multiple_of,
            fixed_length=self.config.seq_length if self.pp_size > 1 else None,
        )


class Collector:
    """Makes rollout batches with the model as it is; called by all ranks, between optimizer steps."""

    def __init__(
        self,
        config: GRPOConfig,
        model: Sequence[nn.Module],
        *,
        engine: RolloutEngine,
        judge: Judge,
        scorer: ResponseScorer,
        layout: BatchLayout,
        reference: ReferenceWeights | None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self._config = config
        self._model = model
        self._engine = engine
        self._judge = judge
        self._scorer = scorer
        self._layout = layout
        self._reference = reference
        self._pgs = pg_collection

    def rollouts(self, step: int) -> RolloutBatch:
        """Responses, rewards and advantages of a rollout step."""
        group, count = self._config.group_size, self._config.prompts_per_step
        tasks = self._judge.environment.training_tasks(step, count=count)
        prompts = [Prompt(t.prompt, i, j) for i, t in enumerate(tasks) for j in range(group)]
        rollouts = self._engine.generate(prompts, replace(self._config.sampling, step=step))
        scores = self._judge.score([task for task in tasks for _ in range(group)], rollouts)
        rewards = torch.tensor([score.reward for score in scores], dtype=torch.float32)
        return RolloutBatch(
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
                normalize_std=self._config.normalize_advantages,
            ),
        )

    def add_log_probs(self, batch: RolloutBatch) -> None:
        """Set `old_log_probs`, and `ref_log_probs` if there is a reference.

        The forward runs on the micro-batches of the first epoch, so the first update sees ratios of
        exactly 1 wherever training forwards are deterministic.
        """
        batch.old_log_probs = self._log_probs(batch, nullcontext())
        if self._reference is not None:
            batch.ref_log_probs = self._log_probs(batch, self._reference.swapped_in())

    def _log_probs(self, batch: RolloutBatch, weights: AbstractContextManager[None]) -> Tensor:
        first_epoch = self._layout.plan(batch)[: len(batch) // self._config.global_batch_size]
        micro_batches = [self._layout.micro_batch(batch, plan) for step in first_epoch for plan in step.micro_batches]
        with weights:
            scored = score_responses(
                self._model,
                micro_batches,
                scorer=self._scorer,
                seq_length=self._config.seq_length,
                micro_batch_size=self._config.micro_batch_size,
                pg_collection=self._pgs,
            )
        log_probs = torch.zeros_like(batch.rollout_log_probs).cuda()
        for micro_batch, rows in zip(micro_batches, scored, strict=True):
            mask = micro_batch.response_mask.cuda()
            log_probs[list(micro_batch.rows), : rows.shape[1]] = rows.masked_fill(~mask, 0.0)
        torch.distributed.all_reduce(log_probs, group=self._pgs.dp)  # each row on one replica
        return log_probs.cpu()
