"""Covariance of a token's advantage and log-prob: what moves the entropy, and which tokens carry it.

Selections are made on the CPU: there the same batch gives the same tokens on every rank, ties included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longact.rl.objectives.log_ratio import OVERFLOW_LOG_RATIO
from megatron_longact.rl.objectives.policy_losses.policy_loss import TokenBatch


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
