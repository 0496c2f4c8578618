"""The objective on micro-batches: Megatron's forward step and loss function.

Losses and metrics are those of the whole optimizer step, whatever its micro-batches and replicas: each
micro-batch contributes its aggregate with the weight that `aggregation_weight` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor, nn

from megatron_longact.longact import LongAct
from megatron_longact.rl.batches.micro_batches import MicroBatch
from megatron_longact.rl.batches.rollout_batch import Row
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.log_probs import ResponseScorer
from megatron_longact.rl.objectives.aggregation import aggregate, aggregation_weight
from megatron_longact.rl.objectives.kl import masked_kl
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES, loss_metrics
from megatron_longact.tokens import TokenRules

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Objective:
    """A policy loss plus, with `kl_beta`, a KL penalty to the reference.

    scorer: makes log-probs out of the model's forward; longact: is told which tokens count;
    dp_size: replicas whose gradients Megatron averages.
    """

    def __init__(
        self,
        config: RLConfig,
        scorer: ResponseScorer,
        longact: LongAct | None,
        *,
        dp_size: int,
    ) -> None:
        self._config = config
        self._policy_loss = POLICY_LOSSES[config.policy_loss]
        self._aggregation = self._policy_loss.aggregation(config.loss)
        self._scorer = scorer
        self._longact = longact
        self._dp_size = dp_size
        self.own_log_probs: dict[tuple[Row, ...], Tensor] = {}
        """Of the last step's micro-batches without old log-probs, which are their own then: [b, R] by their rows."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all that an objective may report, whichever its loss: the same on all ranks, in this order."""
        return ("loss", *loss_metrics(), "kl", "entropy")

    def forward_step(
        self, response_mask: Tensor, *, num_microbatches: int
    ) -> Callable[[Iterator[MicroBatch], nn.Module], tuple[Tensor, LossFunction]]:
        """The function that `train_step` calls for each micro-batch of one optimizer step.

        response_mask: bool [n, R] of all responses of the step, on all replicas.
        """
        self.own_log_probs = {}
        weight = aggregation_weight(response_mask, mode=self._aggregation)
        # Megatron divides by the micro-batches, and averages gradients over the replicas.
        scale = num_microbatches * self._dp_size / max(int(weight), 1)

        def forward(batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, LossFunction]:
            batch = next(batches).cuda()
            self._name_tokens(batch)
            return self._scorer.forward(model, batch), partial(self._loss, batch, scale)

        return forward

    def _name_tokens(self, batch: MicroBatch) -> None:
        longact, shared = self._longact, batch.shared
        if longact is not None and shared is not None:
            rules = TokenRules(longact.config.min_context, longact.config.skip_first_tokens)
            longact.set_tokens(shared.weights(rules), rules_applied=True)
        elif longact is not None:
            longact.set_tokens(batch.token_mask)

    def _loss(self, batch: MicroBatch, scale: float, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask = self._config, batch.response_mask
        log_probs, entropy = output[0], output[1].detach()
        old_log_probs = batch.old_log_probs
        if old_log_probs is None:
            old_log_probs = self.own_log_probs[batch.rows] = log_probs.detach().clone()
        loss, means = self._policy_loss(
            log_probs,
            old_log_probs,
            batch.advantages,
            mask,
            config=config.loss,
            selected=batch.selected,
            importance_weights=batch.importance_weights,
        )
        means = dict(means)
        if batch.ref_log_probs is not None:
            kl = masked_kl(log_probs, batch.ref_log_probs, mask, kind=config.kl_estimator)
            loss = loss + config.kl_beta * aggregate(kl, mask, mode=self._aggregation)
            means["kl"] = aggregate(kl.detach(), mask, mode="token-mean")
        means["entropy"] = aggregate(entropy, mask, mode="token-mean")
        _check_finite(loss)
        weight, tokens = aggregation_weight(mask, mode=self._aggregation), mask.sum()
        sums = {"loss": torch.stack([loss.detach() * weight, weight.float()])}
        for name, mean in means.items():
            sums[name] = torch.stack([mean * tokens, tokens.float()])
        return loss * weight * scale, sums


def _check_finite(loss: Tensor) -> None:
    get_rerun_state_machine().validate_result(
        result=loss.detach(),
        rejection_func=lambda value: not bool(torch.isfinite(value)),
        message="NaN or Inf in the policy loss",
        tolerance=0.0,
        fatal=True,
    )
