"""Clip-Cov: a few tokens of high covariance, drawn at random, are left out of the update."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from megatron_longact.rl.objectives.policy_losses.clipped import clipped_surrogate
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.covariance import (
    share_of_tokens,
    token_covariances,
    tokens_at,
    unclipped_ratio,
)
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss, TokenBatch


def clip_cov_token_losses(
    batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, 0 at the selected tokens; these still count in the mean.

    Metrics: `clip_fraction` (of the surrogate's own clip) and `selected_fraction`.

    Source: arXiv 2505.22617, 4.2.
    """
    assert selected is not None
    loss, clipped = clipped_surrogate(unclipped_ratio(batch), batch.advantages, config=config)
    loss = torch.where(selected, torch.zeros_like(loss), loss)
    return loss, {"clip_fraction": clipped, "selected_fraction": selected}


def select_clip_cov(batch: TokenBatch, *, config: PolicyLossConfig, generator: Generator | None) -> Tensor:
    """A random share clip_cov_ratio of the batch's response tokens, out of those that qualify; bool [b, s].

    A token qualifies when its covariance lies between clip_cov_lower and clip_cov_upper, both
    exclusive, and the surrogate's own clip does not act on it.
    """
    covariances = token_covariances(batch)
    _, clipped = clipped_surrogate(unclipped_ratio(batch), batch.advantages, config=config)
    qualifies = (covariances > config.clip_cov_lower) & (covariances < config.clip_cov_upper)
    candidates = (qualifies & ~clipped[batch.mask].cpu()).nonzero().squeeze(-1)
    count = share_of_tokens(len(covariances), config.clip_cov_ratio)
    drawn = torch.randperm(len(candidates), generator=generator)[:count]
    return tokens_at(candidates[drawn], batch.mask)


CLIP_COV = PolicyLoss(
    token_losses=clip_cov_token_losses, metrics=("clip_fraction", "selected_fraction"), selection=select_clip_cov
)
