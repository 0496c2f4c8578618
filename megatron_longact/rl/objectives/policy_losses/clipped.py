"""PPO's clipped surrogate: the loss of GRPO and DAPO, and a part of others."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_longact.rl.objectives.log_ratio import MAX_LOG_RATIO
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss, TokenBatch


def clipped_token_losses(
    batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with separate lower and upper bound, and with the dual clip where that is on.

    GRPO and DAPO are this with different settings: DAPO has clip_high above clip_low, and
    token-mean. Metrics: `clip_fraction` and `dual_clip_fraction` (the dual clip is the bound).

    Source: GRPO, arXiv 2402.03300, eq. 3, without its KL term; asymmetric clip: DAPO, arXiv
    2503.14476, eq. 10; dual clip: arXiv 1912.09729.
    """
    ratio, advantages = clamped_ratio(batch), batch.advantages
    loss, clipped = clipped_surrogate(ratio, advantages, config=config)
    bounded = torch.zeros_like(clipped)
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.minimum(bound, loss), loss)
    return loss, {"clip_fraction": clipped, "dual_clip_fraction": bounded}


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """max(-A ratio, -A clip(ratio)) and where the clip acts, of one shape with the arguments."""
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(free, clipped), clipped > free


def clamped_ratio(batch: TokenBatch) -> Tensor:
    """The ratio p / p_old, [b, s], with its logarithm clamped to `MAX_LOG_RATIO`."""
    return batch.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


CLIPPED = PolicyLoss(token_losses=clipped_token_losses, metrics=("clip_fraction", "dual_clip_fraction"))
