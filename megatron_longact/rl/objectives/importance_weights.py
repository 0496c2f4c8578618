"""Weights that correct for rollouts sampled from a slightly different policy than the trainer's."""

from typing import Literal, get_args

from torch import Tensor

from megatron_longact.rl.objectives.aggregation import masked
from megatron_longact.rl.objectives.log_ratio import MAX_LOG_RATIO

Level = Literal["token", "sequence"]


def truncated_importance_weights(
    train_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    *,
    level: Level,
    threshold: float,
) -> Tensor:
    """min(p_train / p_rollout, threshold) for each token, to be multiplied with its loss.

    train_log_probs, rollout_log_probs: [b, s]; mask: [b, s]. Returns [b, s], detached, 0 in the
    padding. level "token": the ratio of each token; "sequence": the product of a response's ratios,
    the same at all its tokens. Raises ValueError for another level or a threshold that is not
    positive.

    Source: F. Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training
    (2025), truncated importance sampling.
    """
    if level not in get_args(Level):
        raise ValueError(f"level is {level!r}; it must be one of: {', '.join(get_args(Level))}")
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be positive")
    log_ratio = masked(train_log_probs, mask).detach() - masked(rollout_log_probs, mask).detach()
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=threshold)
    return masked(weights, mask)
