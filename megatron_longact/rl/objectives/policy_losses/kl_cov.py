"""KL-Cov: a KL penalty on the tokens whose covariance is largest."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.covariance import (
    share_of_tokens,
    token_covariances,
    tokens_at,
    unclipped_ratio,
)
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss, TokenBatch


def kl_cov_token_losses(
    batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A ratio, nowhere clipped, plus kl_cov_coef |log p - log p_old| at the selected tokens.

    Metrics: `selected_fraction`, and `clip_fraction`, which is 0. At ratio 1 the penalty has neither
    value nor gradient: it acts from the second optimizer step on a rollout batch on.

    Source: arXiv 2505.22617, 4.2.
    """
    assert selected is not None
    free = -batch.advantages * unclipped_ratio(batch)
    penalty = config.kl_cov_coef * batch.log_ratio.abs()
    loss = free + torch.where(selected, penalty, torch.zeros_like(penalty))
    return loss, {"clip_fraction": torch.zeros_like(selected), "selected_fraction": selected}


def select_kl_cov(batch: TokenBatch, *, config: PolicyLossConfig, generator: Generator | None) -> Tensor:
    """The share kl_cov_ratio of the batch's response tokens with the largest covariance; bool [b, s]."""
    covariances = token_covariances(batch)
    count = share_of_tokens(len(covariances), config.kl_cov_ratio)
    return tokens_at(covariances.topk(count).indices, batch.mask)


KL_COV = PolicyLoss(
    token_losses=kl_cov_token_losses, metrics=("clip_fraction", "selected_fraction"), selection=select_kl_cov
)
