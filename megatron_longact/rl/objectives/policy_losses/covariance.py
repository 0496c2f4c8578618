"""KL-Cov and Clip-Cov: the few tokens whose covariance of advantage and log-prob is large are treated apart.

That covariance is what moves the entropy. Selections are made on the CPU: there the same batch gives the same tokens on
every rank, ties included.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from megatron_longact.rl.objectives.log_ratio import OVERFLOW_LOG_RATIO
from megatron_longact.rl.objectives.policy_losses.clipped import clipped_surrogate
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
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
    token_losses=clip_cov_token_losses,
    metrics=("clip_fraction", "selected_fraction"),
    selection=select_clip_cov,
    usual_clip=(1.0, 1.0),
)


def token_covariances(batch: TokenBatch) -> Tensor:
    """(A - mean A) (log p - mean log p) of the response tokens, row by row: [tokens], on the CPU.

    The means are over all response tokens of the batch.
    Source: Clip-Cov and KL-Cov, arXiv 2505.22617, 4.2.
    """
    advantages = batch.advantages[batch.mask].detach().cpu()
    log_probs = batch.log_probs[batch.mask].detach().cpu()
    return (advantages - advantages.mean()) * (log_probs - log_probs.mean())


def share_of_tokens(tokens: int, ratio: float) -> int:
    """How many tokens a share of them is: rounded down, one at least, none of none."""
    return min(max(int(tokens * ratio), 1), tokens)


def tokens_at(indices: Tensor, mask: Tensor) -> Tensor:
    """A mask [b, s], True at the response tokens with these numbers, counted row by row."""
    chosen = torch.zeros(int(mask.sum()), dtype=torch.bool)
    chosen[indices] = True
    return torch.zeros_like(mask).masked_scatter(mask, chosen.to(mask.device))


def unclipped_ratio(batch: TokenBatch) -> Tensor:
    """The ratio p / p_old, [b, s], kept from overflow."""
    return batch.log_ratio.clamp(max=OVERFLOW_LOG_RATIO).exp()
