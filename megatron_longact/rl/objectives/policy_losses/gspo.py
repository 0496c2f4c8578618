"""GSPO: the ratio of a whole response, clipped."""

from __future__ import annotations

from torch import Tensor

from megatron_longact.rl.objectives.log_ratio import MAX_SEQUENCE_LOG_RATIO
from megatron_longact.rl.objectives.policy_losses.clipped import clipped_surrogate
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss, TokenBatch


def gspo_token_losses(
    batch: TokenBatch, *, config: PolicyLossConfig, selected: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with the geometric mean of a response's ratios in place of each.

    The ratio keeps the gradient of the token's own log-prob (GSPO-token), so that advantages may
    differ within a response. Metric: `clip_fraction`.

    Source: GSPO, arXiv 2507.18071, 4.1 to 4.3.
    """
    lengths = batch.mask.sum(-1).clamp(min=1)
    log_sequence_ratio = (batch.log_ratio.sum(-1) / lengths).detach().unsqueeze(-1)  # [b, 1]
    log_ratio = batch.log_probs - batch.log_probs.detach() + log_sequence_ratio
    ratio = log_ratio.clamp(max=MAX_SEQUENCE_LOG_RATIO).exp()
    loss, clipped = clipped_surrogate(ratio, batch.advantages, config=config)
    return loss, {"clip_fraction": clipped}


GSPO = PolicyLoss(
    token_losses=gspo_token_losses,
    metrics=("clip_fraction",),
    fixed_aggregation="seq-mean-token-mean",
    usual_clip=(3e-4, 4e-4),
)
