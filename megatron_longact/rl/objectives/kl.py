"""Estimators of the KL divergence at sampled tokens."""

from typing import Literal, get_args

from torch import Tensor

from megatron_longact.rl.objectives.aggregation import masked
from megatron_longact.rl.objectives.log_ratio import MAX_LOG_RATIO

KLKind = Literal["k1", "k2", "k3"]

MAX_K3 = 10.0
"""Upper bound of one token's k3 estimate, verl's."""


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, *, kind: KLKind) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token; any shape, same shape back.

    k1: log p - log p_ref, unbiased, can be negative; k2: half its square; k3: the unbiased
    low-variance one, p_ref/p - 1 - log(p_ref/p), never negative, bounded at `MAX_K3`. The gradient
    is that of the value: beyond k3's bounds there is none.
    Source: J. Schulman, Approximating KL divergence (2020).
    """
    if kind == "k1":
        return log_probs - ref_log_probs
    if kind == "k2":
        return 0.5 * (log_probs - ref_log_probs).square()
    if kind == "k3":
        log_ratio = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (log_ratio.exp() - log_ratio - 1).clamp(-MAX_K3, MAX_K3)
    raise ValueError(f"kind is {kind!r}; it must be one of: {', '.join(get_args(KLKind))}")


def masked_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, kind: KLKind) -> Tensor:
    """`kl_penalty` at response tokens, exactly 0 (value and gradient) in the padding; [b, s]."""
    return kl_penalty(masked(log_probs, mask), masked(ref_log_probs, mask), kind=kind)
