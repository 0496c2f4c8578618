"""From the losses of tokens to one number.

Shapes: b responses, s response tokens. A mask is [b, s], bool or any number type, nonzero where a
response token is. What stands in the padding is never read: any finite value there leaves a value
and a gradient as they are.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]


def aggregate(loss: Tensor, mask: Tensor, *, mode: Aggregation) -> Tensor:
    """One number from the losses [b, s] of tokens; responses without any token do not count.

    token-mean: mean over all tokens of the batch (DAPO); seq-mean-token-sum: mean over responses
    of their sums; seq-mean-token-mean: mean over responses of their means (GRPO). Sums run in fp32,
    or fp64 for an fp64 loss. A batch without any token gives 0.
    """
    check_aggregation(mode)
    loss = masked(loss, mask).to(torch.promote_types(loss.dtype, torch.float32))
    if mode == "token-mean":
        total = loss.sum()
    elif mode == "seq-mean-token-sum":
        total = loss.sum(-1).sum()
    else:
        total = (loss.sum(-1) / mask.bool().sum(-1).clamp(min=1)).sum()
    return total / aggregation_weight(mask, mode=mode).clamp(min=1)


def aggregation_weight(mask: Tensor, *, mode: Aggregation) -> Tensor:
    """What `aggregate` divides by: tokens, or responses that have any; an integer scalar.

    The aggregate of a batch is the mean of its micro-batches' aggregates with these weights.
    """
    mask = mask.bool()
    return mask.sum() if mode == "token-mean" else mask.any(-1).sum()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [b, s], of any type, over response tokens: fp32, 0 without any."""
    return aggregate(values.float(), mask, mode="token-mean")


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values [b, s], exactly 0 (value and gradient) in the padding; raises ValueError for other shapes."""
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and their mask {tuple(mask.shape)} must have one shape")
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def check_aggregation(mode: str) -> None:
    """Raise ValueError for a mode that `aggregate` does not know."""
    if mode not in get_args(Aggregation):
        choices = ", ".join(get_args(Aggregation))
        raise ValueError(f"aggregation is {mode!r}; it must be one of: {choices}")
