"""Advantages from the rewards of a group of responses to one prompt."""

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
