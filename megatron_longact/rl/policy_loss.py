"""Policy losses, their aggregation over tokens, and KL estimators.

Shapes: b responses, s response tokens. A mask is bool [b, s], True where a response token is. What
stands in the padding is never read: any finite value there leaves the loss and the gradient as
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KLKind = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before `exp`, as verl does: exp(20) is still far from overflow."""

MAX_K3 = 10.0
"""Upper bound of one token's k3 estimate, verl's."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """How a policy loss clips and averages. Raises ValueError for a value that makes no sense."""

    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""

    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high; larger than clip_low is DAPO's clip-higher."""

    dual_clip: float | None = None
    """Bound of the loss for negative advantages, in units of |advantage|, above 1 (arXiv
    1912.09729); None: off."""

    aggregation: Aggregation = "token-mean"
    """How the tokens' losses become one number; see `aggregate`."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1 or not self.clip_high > 0:
            raise ValueError(
                f"clip_low is {self.clip_low} and clip_high is {self.clip_high}; clip_low must lie "
                "between 0 and 1, and clip_high must be positive"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be greater than 1, or None")
        _check_aggregation(self.aggregation)


PolicyLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    config: PolicyLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with separate lower and upper bound, as GRPO and DAPO use it.

    log_probs, old_log_probs: fp32 [b, s]; advantages: [b, s], or [b] for one a response;
    response_mask: bool [b, s]. Returns the loss, a scalar, and detached metrics, each a mean over
    response tokens: `clip_fraction` (the clipped term is the larger one), `dual_clip_fraction` and
    `kl_old` (log p_old - log p).

    Source: GRPO, arXiv 2402.03300, eq. 3, without its KL term; asymmetric clip: DAPO, arXiv
    2503.14476, eq. 10.
    """
    log_ratio = _masked(log_probs - old_log_probs, response_mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(-1)
    advantages = _masked(advantages.expand_as(ratio), response_mask)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(free, clipped)
    bounded = torch.zeros_like(response_mask)
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
    with torch.no_grad():
        metrics = {
            "clip_fraction": _token_mean(clipped > free, response_mask),
            "dual_clip_fraction": _token_mean(bounded, response_mask),
            "kl_old": _token_mean(-log_ratio, response_mask),
        }
    return aggregate(loss, response_mask, mode=config.aggregation), metrics


POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": grpo_loss}


def aggregate(loss: Tensor, mask: Tensor, *, mode: Aggregation) -> Tensor:
    """One number from the losses [b, s] of tokens; responses without any token do not count.

    token-mean: mean over all tokens of the batch (DAPO); seq-mean-token-sum: mean over responses
    of their sums; seq-mean-token-mean: mean over responses of their means (GRPO). A batch without
    any token gives 0.
    """
    _check_aggregation(mode)
    loss = _masked(loss, mask)
    if mode == "token-mean":
        total = loss.sum()
    elif mode == "seq-mean-token-sum":
        total = loss.sum(-1).sum()
    else:
        total = (loss.sum(-1) / mask.sum(-1).clamp(min=1)).sum()
    return total / aggregation_weight(mask, mode=mode).clamp(min=1)


def aggregation_weight(mask: Tensor, *, mode: Aggregation) -> Tensor:
    """What `aggregate` divides by: tokens, or responses that have any; a scalar.

    The aggregate of a batch is the mean of its micro-batches' aggregates with these weights.
    """
    return mask.sum() if mode == "token-mean" else mask.any(-1).sum()


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, *, kind: KLKind) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token; any shape, same shape back.

    k1: log p - log p_ref, unbiased, can be negative; k2: half its square; k3: the unbiased
    low-variance one, p_ref/p - 1 - log(p_ref/p), never negative, bounded at `MAX_K3`.
    Source: J. Schulman, Approximating KL divergence (2020).
    """
    log_ratio = ref_log_probs - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (log_ratio.exp() - log_ratio - 1).clamp(-MAX_K3, MAX_K3)
    raise ValueError(f"kind is {kind!r}; it must be one of: {', '.join(get_args(KLKind))}")


def masked_kl(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, *, kind: KLKind) -> Tensor:
    """`kl_penalty` at response tokens, exactly 0 (value and gradient) in the padding; [b, s]."""
    return kl_penalty(_masked(log_probs, mask), _masked(ref_log_probs, mask), kind=kind)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return _masked(values.float(), mask).sum() / mask.sum().clamp(min=1)


def _check_aggregation(mode: str) -> None:
    if mode not in get_args(Aggregation):
        choices = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation is {mode!r}; it must be one of: {choices}")
