"""CISPO: a policy gradient whose importance weights are clipped."""

from __future__ import annotations

from torch import Tensor

from megatron_longact.rl.objectives.policy_losses.clipped import clamped_ratio
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss, TokenBatch


def cispo_token_losses(
    batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-clip(ratio) A log p, with no gradient through the ratio: a clipped token still has one.

    Metric: `clip_fraction` (the ratio is outside its bounds).

    Source: MiniMax-M1, arXiv 2506.13585, 3.1.
    """
    ratio = clamped_ratio(batch).detach()
    weight = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return -weight * batch.advantages * batch.log_probs, {"clip_fraction": weight != ratio}


CISPO = PolicyLoss(token_losses=cispo_token_losses, metrics=("clip_fraction",), usual_clip=(1.0, 0.28))
