"""Values and gradients that verl computed from the same inputs and settings.

The numbers are the output of verl's own functions (`core_algos.py`, `rollout_corr_helper.py`, the
overlong term of its DAPO reward manager), version 0.8.0.dev, commit b178a3cd, in fp32.
"""

import pytest
import torch
from torch import Tensor

from megatron_longact.rl import (
    POLICY_LOSSES,
    PolicyLossConfig,
    group_relative_advantages,
    kl_penalty,
    overlong_penalty,
    truncated_importance_weights,
)

LOG_PROBS = torch.tensor([[-0.5, -2.25, -1.0, -3.0], [-1.5, -0.75, -4.0, -0.25], [-2.0, -1.25, -0.5, -2.5]])
OLD_LOG_PROBS = torch.tensor([[-0.75, -2.0, -1.5, -2.9], [-1.25, -0.8, -5.5, -0.5], [-2.1, -1.0, -0.45, -2.0]])
ADVANTAGES = torch.tensor([1.2, -0.8, 0.5])
MASK = torch.arange(4) < torch.tensor([4, 3, 2])[:, None]

Rows = list[list[float]]

# Clip 0.2 and 0.28, dual clip 3; kl-cov: ratio 0.3, coefficient 1; clip-cov: ratio 1, bounds -1 and 1
# (all that qualify are left out, so nothing depends on the draw).
LOSSES: dict[tuple[str, str], tuple[float, Rows]] = {
    ("grpo", "seq-mean-token-mean"): (
        -0.1501374,
        [[0, -0.07788008, 0, -0.09048375], [0, 0.09344632, 0, 0], [-0.09209757, -0.06490007, 0, 0]],
    ),
    ("grpo", "token-mean"): (
        -0.2392595,
        [[0, -0.1038401, 0, -0.120645], [0, 0.09344632, 0, 0], [-0.06139838, -0.04326671, 0, 0]],
    ),
    ("grpo", "seq-mean-token-sum"): (
        -0.7177784,
        [[0, -0.3115203, 0, -0.361935], [0, 0.280339, 0, 0], [-0.1841951, -0.1298001, 0, 0]],
    ),
    ("kl-cov", "seq-mean-token-mean"): (
        0.1299092,
        [
            [-0.04506923, -0.07788008, -0.1648721, -0.09048375],
            [0.06922674, 0.09344632, 0.5094835, 0],
            [-0.09209757, -0.06490007, 0, 0],
        ],
    ),
    ("kl-cov", "token-mean"): (
        0.03530672,
        [
            [-0.06009229, -0.1038401, -0.2198295, -0.120645],
            [0.06922674, 0.09344632, 0.5094835, 0],
            [-0.06139838, -0.04326671, 0, 0],
        ],
    ),
    ("kl-cov", "seq-mean-token-sum"): (
        0.1059201,
        [
            [-0.1802769, -0.3115203, -0.6594886, -0.361935],
            [0.2076802, 0.280339, 1.52845, 0],
            [-0.1841951, -0.1298001, 0, 0],
        ],
    ),
    ("clip-cov", "seq-mean-token-mean"): (0.3069298, [[0, 0, 0, 0], [0, 0.09344632, 0.3983724, 0], [0, 0, 0, 0]]),
    ("clip-cov", "token-mean"): (0.2215965, [[0, 0, 0, 0], [0, 0.09344632, 0.3983724, 0], [0, 0, 0, 0]]),
    ("clip-cov", "seq-mean-token-sum"): (0.6647894, [[0, 0, 0, 0], [0, 0.280339, 1.195117, 0], [0, 0, 0, 0]]),
    ("gspo", "seq-mean-token-mean"): (
        -0.1853883,
        [
            [-0.1105171, -0.1105171, -0.1105171, -0.1105171],
            [0.1371014, 0.1371014, 0.1371014, 0],
            [-0.07731196, -0.07731196, 0, 0],
        ],
    ),
    ("cispo", "seq-mean-token-mean"): (
        0.2791172,
        [
            [-0.128, -0.08, -0.128, -0.09048375],
            [0.07111112, 0.09344632, 0.1137778, 0],
            [-0.09209757, -0.06666667, 0, 0],
        ],
    ),
    ("cispo", "token-mean"): (
        0.4044248,
        [
            [-0.1706667, -0.1066667, -0.1706667, -0.120645],
            [0.07111112, 0.09344632, 0.1137778, 0],
            [-0.06139838, -0.04444445, 0, 0],
        ],
    ),
    ("cispo", "seq-mean-token-sum"): (
        1.213274,
        [[-0.512, -0.32, -0.512, -0.361935], [0.2133334, 0.280339, 0.3413334, 0], [-0.1841951, -0.1333333, 0, 0]],
    ),
}


def close(got: Tensor, numbers: float | Rows | list[float]) -> None:
    """Equal to the seven digits that are written down."""
    torch.testing.assert_close(got, torch.tensor(numbers, dtype=torch.float32), rtol=3e-7, atol=3e-8)


@pytest.mark.parametrize(("name", "mode"), [*LOSSES, *(("dapo", mode) for name, mode in LOSSES if name == "grpo")])
def test_policy_losses(name: str, mode: str) -> None:
    config = PolicyLossConfig(
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        kl_cov_ratio=0.3,
        kl_cov_coef=1.0,
        clip_cov_ratio=1.0,
        clip_cov_lower=-1.0,
        clip_cov_upper=1.0,
        aggregation=mode,
    )
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, _ = POLICY_LOSSES[name](log_probs, OLD_LOG_PROBS, ADVANTAGES, MASK, config=config)
    loss.backward()
    value, gradient = LOSSES["grpo" if name == "dapo" else name, mode]
    close(loss.detach(), value)
    assert log_probs.grad is not None
    close(log_probs.grad, gradient)


def test_advantages() -> None:
    rewards, groups = torch.tensor([1.0, 0.25, -0.5, 0.7, 0.2, 0.9]), torch.tensor([5, -2, 5, 9, -2, 5])
    close(
        group_relative_advantages(rewards, groups),
        [0.6359421, 0.707087, -1.1526452, 0.6999993, -0.7070866, 0.516703],
    )
    close(
        group_relative_advantages(rewards, groups, normalize_std=False),
        [0.5333333, 0.025, -0.9666667, 0.7, -0.025, 0.4333333],
    )


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", [-0.25, 0.05000001, 1.5, 0.25], [1.0, 1.0, 1.0, 1.0]),
        ("k2", [0.03125, 0.00125, 1.125, 0.03125], [-0.25, 0.05000001, 1.5, 0.25]),
        (
            "k3",
            [0.03402543, 0.001229405, 0.7231302, 0.02880073],
            [-0.2840254, 0.04877061, 0.7768698, 0.2211992],
        ),
    ],
)
def test_kl_estimators(kind: str, value: list[float], gradient: list[float]) -> None:
    log_probs = LOG_PROBS[1].clone().requires_grad_()
    kl = kl_penalty(log_probs, OLD_LOG_PROBS[1], kind=kind)
    kl.sum().backward()
    close(kl.detach(), value)
    assert log_probs.grad is not None
    close(log_probs.grad, gradient)


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        (
            "token",
            [[1.2840254, 0.7788008, 1.3, 0.9048375], [0.7788008, 1.0512711, 1.3, 0], [1.1051708, 0.7788008, 0, 0]],
        ),
        ("sequence", [[1.3, 1.3, 1.3, 1.3], [1.3, 1.3, 1.3, 0], [0.8607079, 0.8607079, 0, 0]]),
    ],
)
def test_importance_weights(level: str, weights: Rows) -> None:
    close(truncated_importance_weights(LOG_PROBS, OLD_LOG_PROBS, MASK, level=level, threshold=1.3), weights)


def test_overlong_penalty() -> None:
    lengths = torch.tensor([10, 16, 17, 19, 20])
    penalties = overlong_penalty(lengths, max_response_length=20, buffer_length=4, penalty_factor=0.5)
    close(penalties, [0.0, 0.0, -0.125, -0.375, -0.5])
