"""The training half of an iteration: one optimizer step on a part of a rollout batch."""

from __future__ import annotations

from torch import Tensor

from megatron_longact.rl.batches.micro_batches import BatchLayout
from megatron_longact.rl.batches.plans import StepPlan
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.log_probs import TrainerLogProbs
from megatron_longact.rl.objectives.objective import Objective
from megatron_longact.rl.objectives.token_selection import TokenSelector
from megatron_longact.rl.trainer import MegatronTrainer, StepOutcome, StepSize


class PolicyUpdate:
    """The layout cuts a batch into steps and micro-batches, the objective is minimised on them by the trainer."""

    def __init__(
        self,
        trainer: MegatronTrainer,
        *,
        layout: BatchLayout,
        objective: Objective,
        selector: TokenSelector,
        trainer_log_probs: TrainerLogProbs,
    ) -> None:
        self.layout = layout
        self._trainer = trainer
        self._objective = objective
        self._selector = selector
        self._trainer_log_probs = trainer_log_probs

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a step may report, the same on all ranks."""
        return self._objective.metrics

    @property
    def selects(self) -> bool:
        """Whether the objective treats some tokens apart, which `select` chooses."""
        return self._selector.selects

    def select(self, batch: RolloutBatch, plan: StepPlan, *, updates_done: int) -> Tensor | None:
        """Those tokens, bool [n, R] over the batch; called between optimizer steps. None without a selection."""
        return self._selector.select(batch, plan, update=updates_done)

    def step(self, batch: RolloutBatch, plan: StepPlan, *, selected: Tensor | None) -> StepOutcome:
        """Megatron's optimizer step on the responses of the plan; sets their old log-probs if they were not known."""
        layout, rows = self.layout, list(plan.rows)
        micro_batches = [layout.micro_batch(batch, part, selected=selected) for part in plan.micro_batches]
        outcome = self._trainer.step(
            self._objective.forward_step(batch.response_mask[rows], num_microbatches=len(micro_batches)),
            micro_batches,
            micro_batch_size=layout.micro_batch_size,
            size=StepSize(responses=len(rows), tokens=plan.tokens, squared_lengths=plan.squared_lengths),
        )
        if not outcome.should_exit and not batch.knows_old_log_probs(rows):
            assert batch.old_log_probs is not None
            said = self._objective.own_log_probs  # on the last pipeline stage
            own = [said[part.rows] for part in micro_batches if said]
            batch.old_log_probs[rows] = self._trainer_log_probs.of_training(batch, micro_batches, own)[rows]
        return outcome
