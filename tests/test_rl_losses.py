"""Advantages, the GRPO loss, aggregation and KL against plain loops over Python floats."""

import math

import pytest
import torch
from torch import Tensor

from megatron_longact.rl.advantages import group_relative_advantages
from megatron_longact.rl.policy_loss import (
    POLICY_LOSSES,
    PolicyLossConfig,
    aggregate,
    aggregation_weight,
    kl_penalty,
    masked_kl,
)

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
B, S = 6, 5


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    log_probs = torch.randn(B, S, generator=generator) - 3
    lengths = torch.tensor([5, 3, 0, 1, 4, 5])
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.4 * torch.randn(B, S, generator=generator),
        "advantages": torch.randn(B, generator=generator),
        "response_mask": torch.arange(S) < lengths[:, None],
    }


def naive_grpo(batch: dict[str, Tensor], config: PolicyLossConfig) -> tuple[float, float]:
    """Loss and clip fraction by the definition, one token at a time."""
    rows, tokens, clipped = [], 0, 0
    for i in range(B):
        row = []
        for t in range(S):
            if not batch["response_mask"][i, t]:
                continue
            ratio = math.exp(batch["log_probs"][i, t] - batch["old_log_probs"][i, t])
            advantage = float(batch["advantages"][i])
            bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            objective = min(ratio * advantage, bounded * advantage)
            clipped += bounded * advantage < ratio * advantage
            if advantage < 0 and config.dual_clip is not None:
                objective = max(objective, config.dual_clip * advantage)
            row.append(-objective)
            tokens += 1
        if row:
            rows.append(row)
    totals = {
        "token-mean": sum(map(sum, rows)) / tokens,
        "seq-mean-token-sum": sum(map(sum, rows)) / len(rows),
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / len(rows),
    }
    return totals[config.aggregation], clipped / tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_grpo_is_the_definition(batch: dict[str, Tensor], mode: str, dual_clip: float | None) -> None:
    config = PolicyLossConfig(clip_low=0.1, clip_high=0.3, dual_clip=dual_clip, aggregation=mode)
    loss, metrics = POLICY_LOSSES["grpo"](**batch, config=config)
    expected, clip_fraction = naive_grpo(batch, config)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < clip_fraction < 1
    torch.testing.assert_close(metrics["clip_fraction"].item(), clip_fraction)


def test_clip_bounds_act_separately() -> None:
    ratios, advantages = torch.tensor([[2.0], [0.5]]), torch.tensor([1.0, -1.0])
    mask = torch.ones(2, 1, dtype=torch.bool)

    def loss(low: float, high: float) -> float:
        config = PolicyLossConfig(clip_low=low, clip_high=high)
        log_probs = ratios.log()
        return POLICY_LOSSES["grpo"](log_probs, torch.zeros(2, 1), advantages, mask, config=config)[0].item()

    assert loss(0.1, 0.3) == pytest.approx((-1.3 + 0.9) / 2)
    assert loss(0.3, 0.1) == pytest.approx((-1.1 + 0.7) / 2)


def test_first_update_has_the_policy_gradient(batch: dict[str, Tensor]) -> None:
    """At ratio 1 nothing is clipped and the gradient is -advantage over the number of tokens."""
    log_probs = batch["log_probs"].clone().requires_grad_()
    batch |= {"log_probs": log_probs, "old_log_probs": log_probs.detach()}
    loss, metrics = POLICY_LOSSES["grpo"](**batch, config=PolicyLossConfig())
    loss.backward()
    mask = batch["response_mask"]
    expected = -batch["advantages"][:, None] * mask / mask.sum()
    torch.testing.assert_close(log_probs.grad, expected)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_old"] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("garbage", [1e30, -1e30, 123.0])
def test_padding_is_never_read(batch: dict[str, Tensor], mode: str, garbage: float) -> None:
    config = PolicyLossConfig(dual_clip=3.0, aggregation=mode)
    mask = batch["response_mask"]

    def run(fill: float) -> list[Tensor]:
        log_probs = batch["log_probs"].masked_fill(~mask, fill).requires_grad_()
        old = batch["old_log_probs"].masked_fill(~mask, -fill)
        advantages = batch["advantages"][:, None].expand(B, S).masked_fill(~mask, fill)
        loss, metrics = POLICY_LOSSES["grpo"](log_probs, old, advantages, mask, config=config)
        kls = [masked_kl(log_probs, old, mask, kind=kind) for kind in ("k1", "k2", "k3")]
        total = loss + sum(aggregate(kl, mask, mode=mode) for kl in kls)
        total.backward()
        assert log_probs.grad is not None
        return [total, log_probs.grad, *metrics.values(), *kls]

    for got, clean in zip(run(garbage), run(0.0), strict=True):
        torch.testing.assert_close(got, clean, rtol=0, atol=0)
    assert (run(garbage)[1][~mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_make_up_the_batch(batch: dict[str, Tensor], mode: str) -> None:
    loss, mask = batch["log_probs"], batch["response_mask"]
    parts = [(loss[:2], mask[:2]), (loss[2:3], mask[2:3]), (loss[3:], mask[3:])]
    weighted = sum(aggregate(part, m, mode=mode) * aggregation_weight(m, mode=mode) for part, m in parts)
    total = weighted / aggregation_weight(mask, mode=mode)
    torch.testing.assert_close(total, aggregate(loss, mask, mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_tokens_is_zero(mode: str) -> None:
    loss = torch.full((2, 3), 5.0, requires_grad=True)
    total = aggregate(loss, torch.zeros(2, 3, dtype=torch.bool), mode=mode)
    total.backward()
    assert total == 0
    assert loss.grad is not None
    assert (loss.grad == 0).all()


def test_kl_estimators() -> None:
    log_probs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    r = ref - log_probs
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k1"), -r)
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k2"), r**2 / 2)
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k3"), r.exp() - 1 - r)
    assert (kl_penalty(log_probs, ref, kind="k3") >= 0).all()


def test_kl_estimators_agree_on_average() -> None:
    """k1 and k3 are unbiased: their expectation under the policy is the exact KL."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_penalty(p.log(), q.log(), kind=kind)).sum(), exact)


def test_advantages_by_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.5, 1.0])
    groups = torch.tensor([3, 3, 8, 3, 8, 3])
    got = group_relative_advantages(rewards, groups)
    for group in (3, 8):
        members = rewards[groups == group]
        expected = (members - members.mean()) / (members.std() + 1e-6)
        torch.testing.assert_close(got[groups == group], expected)
    centred = group_relative_advantages(rewards, groups, normalize_std=False)
    torch.testing.assert_close(centred[groups == 3], rewards[groups == 3] - 1.0)


def test_a_group_without_spread_teaches_nothing() -> None:
    rewards = torch.full((8,), 1 / 3)
    advantages = group_relative_advantages(rewards, torch.zeros(8, dtype=torch.long))
    assert advantages.abs().max() < 1e-9


def test_a_group_of_one_keeps_its_reward() -> None:
    advantage = group_relative_advantages(torch.tensor([0.7]), torch.tensor([4]))
    torch.testing.assert_close(advantage, torch.tensor([0.7]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"clip_low": 0.0},
        {"clip_low": 1.0},
        {"clip_high": -0.1},
        {"dual_clip": 1.0},
        {"aggregation": "mean"},
    ],
)
def test_bad_config_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PolicyLossConfig(**bad)


def test_bad_inputs_are_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(batch["log_probs"], batch["log_probs"], kind="k4")
    with pytest.raises(ValueError, match="equally long"):
        group_relative_advantages(torch.zeros(3), torch.zeros(2))
