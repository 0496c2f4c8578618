"""The tokens that a covariance objective treats apart, chosen over a whole optimizer step.

KL-Cov and Clip-Cov rank tokens by the covariance of advantage and log-prob over the global batch: all
micro-batches, all data-parallel ranks. That takes the log-probs of the policy that is about to be updated,
so one forward without gradient before each optimizer step; the first one on a rollout batch has them already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longact.rl.batches.plans import StepPlan
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.log_probs import TrainerLogProbs
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES


class TokenSelector:
    """Chooses them with the model as it is; called by all ranks, between optimizer steps."""

    def __init__(self, config: RLConfig, trainer_log_probs: TrainerLogProbs) -> None:
        self._config = config
        self._loss = POLICY_LOSSES[config.policy_loss]
        self._trainer_log_probs = trainer_log_probs

    @property
    def selects(self) -> bool:
        """Whether the objective has a selection at all."""
        return self._loss.selection is not None

    def select(self, batch: RolloutBatch, plan: StepPlan, *, update: int) -> Tensor | None:
        """Bool [n, R] over a rollout batch, for its optimizer step number `update`; None without a selection.

        The same on all ranks and in every layout, up to rounding of the log-probs.
        """
        if not self.selects:
            return None
        assert batch.old_log_probs is not None
        log_probs = batch.old_log_probs if update == 0 else self._trainer_log_probs.of_steps(batch, [plan])
        rows = list(plan.rows)
        key = (self._config.seed * 1_000_003 + batch.step) * 1_009 + update
        chosen = self._loss.select(
            log_probs[rows],
            batch.old_log_probs[rows],
            batch.advantages[rows],
            batch.response_mask[rows],
            config=self._config.loss,
            generator=torch.Generator().manual_seed(key),
        )
        assert chosen is not None
        selected = torch.zeros_like(batch.response_mask)
        selected[rows] = chosen
        return selected
