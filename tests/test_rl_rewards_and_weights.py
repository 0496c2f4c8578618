"""Group advantages, the punishment of overlong responses, and importance weights, against plain loops."""

import math
import subprocess
import sys

import pytest
import torch

from megatron_longact.rl import group_relative_advantages, overlong_penalty, truncated_importance_weights


def test_advantages_by_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.5, 1.0])
    groups = torch.tensor([3, 3, -8, 3, -8, 3])
    got = group_relative_advantages(rewards, groups)
    for group in (3, -8):
        members = rewards[groups == group]
        expected = (members - members.mean()) / (members.std() + 1e-6)
        torch.testing.assert_close(got[groups == group], expected)
    centred = group_relative_advantages(rewards, groups, normalize_std=False)
    torch.testing.assert_close(centred[groups == 3], rewards[groups == 3] - 1.0)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 16])
@pytest.mark.parametrize("reward", [1 / 3, 0.1, 0.7])
def test_a_group_without_spread_teaches_nothing(size: int, reward: float) -> None:
    rewards = torch.full((size,), reward)
    assert (group_relative_advantages(rewards, torch.zeros(size, dtype=torch.long)) == 0).all()


def test_a_group_of_one_keeps_its_reward() -> None:
    rewards, groups = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([4, 9, 9])
    assert group_relative_advantages(rewards, groups)[0].item() == pytest.approx(0.7 / (1 + 1e-6), rel=1e-7)
    assert group_relative_advantages(rewards, groups, normalize_std=False)[0] == rewards[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.long, torch.bool])
def test_rewards_of_any_type(dtype: torch.dtype) -> None:
    rewards, groups = torch.tensor([1, 0, 0, 1]).to(dtype), torch.tensor([0, 0, 0, 0])
    got = group_relative_advantages(rewards, groups)
    assert got.dtype == (dtype if dtype.is_floating_point else torch.float32)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5]) / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(got, expected.to(got.dtype))


def test_no_rewards_no_advantages() -> None:
    assert group_relative_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        group_relative_advantages(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (60, 0.0), (61, -0.0125), (80, -0.25), (100, -0.5), (140, -0.5)]
)
def test_overlong_penalty(length: int, penalty: float) -> None:
    """Nothing up to 60, a straight line from there, half a reward at 100 and beyond."""
    got = overlong_penalty(torch.tensor([length]), max_response_length=100, buffer_length=40, penalty_factor=0.5)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([penalty])


@pytest.mark.parametrize("bad", [{"buffer_length": 0}, {"buffer_length": 101}, {"penalty_factor": -1.0}])
def test_bad_overlong_settings_are_refused(bad: dict) -> None:
    settings = {"max_response_length": 100, "buffer_length": 40, "penalty_factor": 1.0} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        overlong_penalty(torch.tensor([1]), **settings)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_importance_weights(level: str, threshold: float) -> None:
    generator = torch.Generator().manual_seed(2)
    rollout = torch.randn(4, 6, generator=generator) - 2
    train = rollout + 0.5 * torch.randn(4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 0, 1])[:, None]
    got = truncated_importance_weights(
        train.masked_fill(~mask, 1e30), rollout.masked_fill(~mask, -1e30), mask, level=level, threshold=threshold
    )
    for i in range(4):
        tokens = mask[i].nonzero().squeeze(-1).tolist()
        differences = [float(train[i, t] - rollout[i, t]) for t in tokens]
        for t in range(6):
            log_ratio = sum(differences) if level == "sequence" else float(train[i, t] - rollout[i, t])
            expected = min(math.exp(log_ratio), threshold) if t in tokens else 0.0
            assert got[i, t].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_detached_and_bounded(level: str) -> None:
    train = torch.tensor([[-1.0, 5e3, -5e3]], requires_grad=True)
    weights = truncated_importance_weights(train, torch.zeros(1, 3), torch.ones(1, 3), level=level, threshold=1e12)
    assert not weights.requires_grad
    assert weights.max() <= math.exp(20) * (1 + 1e-6)
    assert weights.min() > 0


def test_bad_weight_settings_are_refused() -> None:
    values, mask = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="response"):
        truncated_importance_weights(values, values, mask, level="response", threshold=2.0)
    with pytest.raises(ValueError, match="threshold"):
        truncated_importance_weights(values, values, mask, level="token", threshold=0.0)


def test_objectives_do_not_import_megatron() -> None:
    names = "group_relative_advantages, aggregate, kl_penalty, POLICY_LOSSES, PolicyLossConfig"
    names += ", overlong_penalty, truncated_importance_weights"
    check = "assert not [name for name in sys.modules if name.split('.')[0] == 'megatron']"
    program = f"import sys; from megatron_longact.rl import {names}; {check}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
