"""What all policy losses share: masking, importance weights, aggregation, metrics.

Shapes: b responses, s response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from megatron_longact.rl.objectives.aggregation import Aggregation, aggregate, masked, token_mean
from megatron_longact.rl.objectives.log_ratio import MAX_LOG_RATIO
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig

KL_OLD = "kl_old"
"""A metric of every loss: log p_old - log p, bounded at `MAX_LOG_RATIO`."""


@dataclass(frozen=True)
class TokenBatch:
    """What a policy loss reads: [b, s] each, exactly 0 in the padding."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    """bool"""

    @classmethod
    def of(cls, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> TokenBatch:
        """Of tensors that may hold any finite value in the padding; advantages: [b, s] or [b]."""
        mask = mask.bool()
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(-1)
        advantages = advantages.expand_as(mask)  # [b] or [b, s] -> [b, s]
        return cls(masked(log_probs, mask), masked(old_log_probs, mask), masked(advantages, mask), mask)

    @property
    def log_ratio(self) -> Tensor:
        """The logarithm of p / p_old, [b, s]."""
        return self.log_probs - self.old_log_probs


class TokenLosses(Protocol):
    """The losses of tokens, and what is worth reporting of them."""

    def __call__(
        self, batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [b, s], and for each metric its value at each token, [b, s] of any type."""


class TokenSelection(Protocol):
    """The tokens of a whole batch that a loss treats differently."""

    def __call__(self, batch: TokenBatch, *, config: PolicyLossConfig, generator: Generator | None) -> Tensor:
        """A mask [b, s], False in the padding."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """One of `POLICY_LOSSES`: called with a batch, it gives the loss and its metrics."""

    token_losses: TokenLosses
    metrics: tuple[str, ...]
    """What `token_losses` reports, by name; one of every run's columns, null in runs with another loss."""

    selection: TokenSelection | None = None
    """None: the loss treats all tokens alike."""

    fixed_aggregation: Aggregation | None = None
    """How its tokens' losses become one number, whatever the configuration says; None: as that says."""

    usual_clip: tuple[float, float] | None = None
    """clip_low and clip_high of its paper, for a run that gives none; None: those of the program."""

    def aggregation(self, config: PolicyLossConfig) -> Aggregation:
        """How the tokens' losses become one number."""
        return self.fixed_aggregation or config.aggregation

    def __call__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        *,
        config: PolicyLossConfig,
        selected: Tensor | None = None,
        importance_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and detached fp32 metrics, each a mean over response tokens.

        log_probs, old_log_probs: [b, s]; advantages: [b, s], or [b] for one a response;
        response_mask: [b, s], bool or number. selected: this batch's part of what `select` gave for
        a larger one; None: chosen within this batch. importance_weights: [b, s], multiplied with
        the tokens' losses (`truncated_importance_weights`).

        The metrics are those that the loss declares, and `KL_OLD`. Raises ValueError if it reports others.
        """
        batch = TokenBatch.of(log_probs, old_log_probs, advantages, response_mask)
        selected = self._selected(batch, config, selected)
        losses, metrics = self.token_losses(batch, config=config, selected=selected)
        if set(metrics) != set(self.metrics):
            raise ValueError(f"a policy loss declares the metrics {self.metrics} and reports {tuple(metrics)}")
        if importance_weights is not None:
            losses = losses * masked(importance_weights, batch.mask)
        metrics = metrics | {KL_OLD: -batch.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)}
        means = {name: token_mean(values.detach(), batch.mask) for name, values in metrics.items()}
        return aggregate(losses, batch.mask, mode=self.aggregation(config)), means

    def select(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        *,
        config: PolicyLossConfig,
        generator: Generator | None = None,
    ) -> Tensor | None:
        """The tokens, bool [n, R], that the loss treats differently; None if it treats all alike.

        The tensors are those of all n responses of an optimizer step, from all replicas and micro-batches,
        in an order that does not depend on the layout; log_probs are of the policy that is
        about to be updated. generator: of draws, on the CPU; None: torch's own.
        """
        if self.selection is None:
            return None
        batch = TokenBatch.of(log_probs, old_log_probs, advantages, response_mask)
        with torch.no_grad():
            return self.selection(batch, config=config, generator=generator)

    def _selected(self, batch: TokenBatch, config: PolicyLossConfig, given: Tensor | None) -> Tensor | None:
        if self.selection is None:
            if given is not None:
                raise ValueError("tokens were selected for a policy loss that treats all tokens alike")
            return None
        if given is not None:
            return masked(given.bool(), batch.mask)
        with torch.no_grad():
            return self.selection(batch, config=config, generator=None)
