"""The training half of an iteration: one optimizer step on a part of a rollout batch."""

from __future__ import annotations

from torch import Tensor

from megatron_longact.rl.batches.micro_batches import BatchLayout
from megatron_longact.rl.batches.plans import StepPlan
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.objectives.objective import Objective
from megatron_longact.rl.objectives.token_selection import TokenSelector
from megatron_longact.rl.trainer import MegatronTrainer, StepOutcome, StepSize


class PolicyUpdate:
    """The layout cuts a batch into steps and micro-batches, the objective is minimised on them by the trainer."""

    def __init__(
        self, trainer: MegatronTrainer, *, layout: BatchLayout, objective: Objective, selector: TokenSelector
    ) -> None:
        self.layout = layout
        self._trainer = trainer
        self._objective = objective
        self._selector = selector

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
        """Megatron's optimizer step on the responses of the plan."""
        layout, parts = self.layout, plan.micro_batches
        lengths = [batch.total_length(row) for row in plan.rows]
        return self._trainer.step(
            self._objective.forward_step(batch.response_mask[list(plan.rows)], num_microbatches=len(parts)),
            [layout.micro_batch(batch, part, selected=selected) for part in parts],
            micro_batch_size=layout.micro_batch_size,
            size=StepSize(responses=len(plan.rows), tokens=sum(lengths), squared_lengths=sum(n * n for n in lengths)),
        )
