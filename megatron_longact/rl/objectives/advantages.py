"""From rewards to advantages: what is taken off for length, and what a response is worth in its group."""

import torch
from torch import Tensor


def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """Each reward relative to its group's mean, in units of its standard deviation (GRPO).

    rewards: [b], any dtype; group_ids: [b], any integers, equal within a group. Returns [b] in the
    rewards' dtype, or fp32 for rewards that are not floating point. The standard deviation is the
    unbiased one. A group of one keeps its reward (mean 0, deviation 1), as in verl. Sums run in
    fp64, so that a group of equal rewards gets exactly nothing out of rounding: in fp32 eight
    rewards of 1/3 would not cancel.

    normalize_std=False leaves the deviation out (Dr. GRPO, arXiv 2503.20783).
    Source: GRPO, arXiv 2402.03300, 4.1.2.
    """
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)} must both be "
            "one-dimensional and equally long"
        )
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    exact = rewards.double()
    alone = sizes == 1
    mean = (_sum_by_group(exact, group, len(sizes)) / sizes).masked_fill(alone, 0.0)
    centred = exact - mean[group]
    if normalize_std:
        variance = _sum_by_group(centred.square(), group, len(sizes)) / (sizes - 1).clamp(min=1)
        std = variance.sqrt().masked_fill(alone, 1.0)
        centred = centred / (std[group] + eps)
    return centred.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def _sum_by_group(values: Tensor, group: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add(0, group, values)


def overlong_penalty(lengths: Tensor, *, max_response_length: int, buffer_length: int, penalty_factor: float) -> Tensor:
    """What to add to the reward of a response for its length: between -penalty_factor and 0.

    lengths: [b], response tokens, the end-of-text token included. Returns [b], floating point: 0 up
    to max_response_length - buffer_length, from there a straight line down to -penalty_factor at
    max_response_length, and -penalty_factor beyond. Raises ValueError for a buffer that is not
    within the response or a negative factor.

    Source: DAPO, arXiv 2503.14476, 3.4, which has penalty_factor 1.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"buffer_length is {buffer_length}; it must be at least 1 and at most max_response_length "
            f"{max_response_length}"
        )
    if not penalty_factor >= 0:
        raise ValueError(f"penalty_factor is {penalty_factor}; it must not be negative")
    exceeding = lengths - (max_response_length - buffer_length)
    return (-exceeding / buffer_length * penalty_factor).clamp(min=-penalty_factor, max=0)
