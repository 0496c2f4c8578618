"""Policy losses, aggregation and KL against plain loops over tokens."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact.rl import POLICY_LOSSES, PolicyLoss, PolicyLossConfig, aggregate, aggregation_weight, kl_penalty
from megatron_longact.rl.objectives.kl import masked_kl
from megatron_longact.rl.objectives.policy_losses import loss_metrics

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
NAMES = sorted(POLICY_LOSSES)
B, S = 6, 5

Batch = dict[str, Tensor]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    log_probs = torch.randn(B, S, generator=generator, dtype=torch.float64) - 3
    lengths = torch.tensor([5, 3, 0, 1, 4, 5])
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.4 * torch.randn(B, S, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(B, generator=generator, dtype=torch.float64),
        "response_mask": torch.arange(S) < lengths[:, None],
    }


def naive_loss(name: str, batch: Batch, config: PolicyLossConfig, selected: Tensor | None) -> Tensor:
    """The loss by its definition, one token at a time."""
    rows = []
    for i in range(B):
        tokens = [t for t in range(S) if batch["response_mask"][i, t]]
        if tokens:
            rows.append([naive_token(name, batch, config, selected, i, t, tokens) for t in tokens])
    totals = {
        "token-mean": sum(map(sum, rows)) / sum(map(len, rows)),
        "seq-mean-token-sum": sum(map(sum, rows)) / len(rows),
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / len(rows),
    }
    return totals["seq-mean-token-mean" if name == "gspo" else config.aggregation]


def naive_token(
    name: str, batch: Batch, config: PolicyLossConfig, selected: Tensor | None, i: int, t: int, tokens: list[int]
) -> Tensor:
    log_prob, advantage = batch["log_probs"][i, t], batch["advantages"][i]
    if advantage.dim():
        advantage = advantage[t]
    log_ratios = {u: batch["log_probs"][i, u] - batch["old_log_probs"][i, u] for u in tokens}
    ratio = log_ratios[t].exp()
    if name == "gspo":
        mean = sum(log_ratios[u].item() for u in tokens) / len(tokens)
        ratio = ratio / ratio.item() * math.exp(mean)
    if name == "cispo":
        return -clip(ratio, config).detach() * advantage * log_prob
    if name == "kl-cov":
        penalty = config.kl_cov_coef * abs(log_ratios[t]) if selected[i, t] else 0.0
        return -advantage * ratio + penalty
    if name == "clip-cov" and selected[i, t]:
        return 0 * log_prob
    objective = min(ratio * advantage, clip(ratio, config) * advantage)
    if name in ("grpo", "dapo") and advantage < 0 and config.dual_clip is not None:
        objective = max(objective, config.dual_clip * advantage)
    return -objective


def clip(ratio: Tensor, config: PolicyLossConfig) -> Tensor:
    low, high = (ratio.new_tensor(bound) for bound in (1 - config.clip_low, 1 + config.clip_high))
    return min(max(ratio, low), high)


def make_config(mode: str, **settings: float | None) -> PolicyLossConfig:
    """Settings at which each of the losses has something to do on the batch of this file."""
    covariance = {"kl_cov_ratio": 0.2, "kl_cov_coef": 0.7, "clip_cov_ratio": 0.2}
    bounds = {"clip_cov_lower": -1.0, "clip_cov_upper": 1.0}
    return PolicyLossConfig(clip_low=0.1, clip_high=0.3, aggregation=mode, **covariance, **bounds, **settings)


def select(name: str, batch: Batch, config: PolicyLossConfig) -> Tensor | None:
    return POLICY_LOSSES[name].select(**batch, config=config, generator=torch.Generator().manual_seed(3))


def value_and_gradient(name: str, batch: Batch, config: PolicyLossConfig, **given: Tensor | None) -> list[Tensor]:
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, metrics = POLICY_LOSSES[name](**batch | {"log_probs": log_probs}, config=config, **given)
    loss.backward()
    assert log_probs.grad is not None
    return [loss.detach(), log_probs.grad, *metrics.values()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.2])
def test_loss_is_its_definition(batch: Batch, name: str, mode: str, by_token: bool, dual_clip: float | None) -> None:
    if by_token:
        advantages = torch.randn(B, S, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        batch |= {"advantages": advantages}
    config = make_config(mode, dual_clip=dual_clip)
    selected = select(name, batch, config)
    loss, gradient, *_ = value_and_gradient(name, batch, config, selected=selected)
    log_probs = batch["log_probs"].clone().requires_grad_()
    expected = naive_loss(name, batch | {"log_probs": log_probs}, config, selected)
    expected.backward()
    # fp64 against fp64: the order of a few dozen additions.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, log_probs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_settings_act(batch: Batch, name: str) -> None:
    """The batch is one on which each setting of each loss changes its value: the test above is not idle."""
    acting = {
        "grpo": {"clip_low": 0.3, "clip_high": 0.1, "dual_clip": 1.2},
        "dapo": {"clip_low": 0.3, "clip_high": 0.1, "dual_clip": 1.2},
        "gspo": {"clip_low": 0.3, "clip_high": 0.1},
        "cispo": {"clip_low": 0.3, "clip_high": 0.1},
        "kl-cov": {"kl_cov_ratio": 0.5, "kl_cov_coef": 0.1},
        "clip-cov": {"clip_low": 0.3, "clip_high": 0.1, "clip_cov_ratio": 0.5, "clip_cov_lower": 0.0},
    }
    settings = vars(make_config("token-mean"))

    def loss(**change: float) -> float:
        config = PolicyLossConfig(**settings | change)
        selected = select(name, batch, config)
        return value_and_gradient(name, batch, config, selected=selected)[0].item()

    for setting, value in acting[name].items():
        assert loss(**{setting: value}) != loss(), setting


def test_clip_fraction_counts_tokens(batch: Batch) -> None:
    metrics = POLICY_LOSSES["grpo"](**batch, config=make_config("token-mean"))[1]
    clipped, tokens = 0, 0
    for i, t in batch["response_mask"].nonzero().tolist():
        ratio = (batch["log_probs"][i, t] - batch["old_log_probs"][i, t]).exp()
        outside = ratio > 1.3 if batch["advantages"][i] > 0 else ratio < 0.9
        clipped, tokens = clipped + int(outside), tokens + 1
    assert 0 < clipped < tokens
    assert metrics["clip_fraction"].item() == pytest.approx(clipped / tokens)


def test_clip_bounds_act_separately() -> None:
    ratios, advantages = torch.tensor([[2.0], [0.5]]), torch.tensor([1.0, -1.0])
    mask = torch.ones(2, 1, dtype=torch.bool)

    def loss(low: float, high: float) -> float:
        config = PolicyLossConfig(clip_low=low, clip_high=high)
        log_probs = ratios.log()
        return POLICY_LOSSES["grpo"](log_probs, torch.zeros(2, 1), advantages, mask, config=config)[0].item()

    assert loss(0.1, 0.3) == pytest.approx((-1.3 + 0.9) / 2)
    assert loss(0.3, 0.1) == pytest.approx((-1.1 + 0.7) / 2)


@pytest.mark.parametrize("name", ["grpo", "dapo", "kl-cov", "cispo"])
def test_first_update_has_the_policy_gradient(batch: Batch, name: str) -> None:
    """At ratio 1 nothing is clipped or penalised and the gradient is -advantage over the number of tokens."""
    batch |= {"old_log_probs": batch["log_probs"]}
    log_probs = batch["log_probs"].clone().requires_grad_()
    loss, metrics = POLICY_LOSSES[name](**batch | {"log_probs": log_probs}, config=PolicyLossConfig())
    loss.backward()
    mask = batch["response_mask"]
    torch.testing.assert_close(log_probs.grad, -batch["advantages"][:, None] * mask / mask.sum())
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_old"] == 0


def test_gspo_at_ratio_one_has_the_mean_of_each_response(batch: Batch) -> None:
    batch |= {"old_log_probs": batch["log_probs"]}
    config = PolicyLossConfig(aggregation="seq-mean-token-mean")
    _, gradient, *_ = value_and_gradient("gspo", batch, config)
    mask = batch["response_mask"]
    per_token = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(gradient, -batch["advantages"][:, None] * per_token / mask.any(-1).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("garbage", [3e38, -1e30, 123.0])
def test_padding_is_never_read(batch: Batch, name: str, mode: str, garbage: float) -> None:
    config, mask = make_config(mode, dual_clip=3.0), batch["response_mask"]

    def run(fill: float) -> list[Tensor]:
        padded = {
            "log_probs": batch["log_probs"].float().masked_fill(~mask, fill),
            "old_log_probs": batch["old_log_probs"].float().masked_fill(~mask, -fill),
            "advantages": batch["advantages"].float()[:, None].expand(B, S).masked_fill(~mask, fill),
            "response_mask": mask,
        }
        weights = torch.ones(B, S).masked_fill(~mask, fill)
        torch.manual_seed(5)
        return value_and_gradient(name, padded, config, importance_weights=weights)

    got = run(garbage)
    for value, clean in zip(got, run(0.0), strict=True):
        torch.testing.assert_close(value, clean, rtol=0, atol=0)
    assert (got[1][~mask] == 0).all()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_reads_no_padding(batch: Batch, kind: str) -> None:
    mask = batch["response_mask"]

    def run(fill: float) -> list[Tensor]:
        log_probs = batch["log_probs"].masked_fill(~mask, fill).requires_grad_()
        kl = masked_kl(log_probs, batch["old_log_probs"].masked_fill(~mask, -fill), mask, kind=kind)
        aggregate(kl, mask, mode="token-mean").backward()
        assert log_probs.grad is not None
        return [kl.detach(), log_probs.grad]

    for value, clean in zip(run(1e30), run(0.0), strict=True):
        torch.testing.assert_close(value, clean, rtol=0, atol=0)
        assert (value[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_a_mask_may_be_of_numbers(batch: Batch, name: str, dtype: torch.dtype) -> None:
    config = make_config("seq-mean-token-mean")

    def run(mask: Tensor) -> list[Tensor]:
        torch.manual_seed(5)
        return value_and_gradient(name, batch | {"response_mask": mask}, config)

    mask = batch["response_mask"]
    for value, expected in zip(run(mask.to(dtype)), run(mask), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_up_the_batch(batch: Batch, name: str, mode: str) -> None:
    """Also where tokens are selected: the selection is the whole batch's, each part is told its own."""
    config = make_config(mode, dual_clip=1.2)
    mode = POLICY_LOSSES[name].aggregation(config)
    selected = select(name, batch, config)
    weight = aggregation_weight(batch["response_mask"], mode=mode)
    total, gradients, metrics = 0.0, [], 0.0
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part = {key: value[rows] for key, value in batch.items()}
        mine = None if selected is None else selected[rows]
        loss, gradient, *means = value_and_gradient(name, part, config, selected=mine)
        share = float(aggregation_weight(part["response_mask"], mode=mode)) / float(weight)
        total, gradients = total + loss * share, [*gradients, gradient * share]
        metrics = metrics + torch.stack(means) * part["response_mask"].sum() / batch["response_mask"].sum()
    loss, gradient, *means = value_and_gradient(name, batch, config, selected=selected)
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics, torch.stack(means))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_tokens_is_zero(batch: Batch, name: str, mode: str) -> None:
    empty = batch | {"response_mask": torch.zeros(B, S, dtype=torch.bool)}
    for value in value_and_gradient(name, empty, make_config(mode)):
        assert (value == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_far_log_ratios_stay_finite(batch: Batch, name: str) -> None:
    far = torch.tensor([-1e4, -100.0, 25.0, 100.0, 1e4])
    for advantages in (batch["advantages"].float(), torch.zeros(B)):
        log_probs = batch["log_probs"].float()
        extreme = batch | {"log_probs": log_probs, "old_log_probs": log_probs - far, "advantages": advantages}
        for value in value_and_gradient(name, extreme, make_config("token-mean")):
            assert value.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_importance_weights_scale_token_losses(batch: Batch, name: str) -> None:
    """Zeros leave a response out without shrinking the mean's denominator; ones change nothing."""
    config = make_config("seq-mean-token-sum")
    selected = select(name, batch, config)
    plain = value_and_gradient(name, batch, config, selected=selected)
    ones = value_and_gradient(name, batch, config, selected=selected, importance_weights=torch.ones(B, S))
    for value, expected in zip(ones, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, check_dtype=False)
    by_response = torch.tensor([0.0, 2.0, 1.0, 0.5, 1.0, 0.0])[:, None].expand(B, S)
    weighted = value_and_gradient(name, batch, config, selected=selected, importance_weights=by_response)
    torch.testing.assert_close(weighted[1], plain[1] * by_response, check_dtype=False)


def test_a_metric_that_a_loss_declares_is_a_column_of_every_run(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> None:
    def plain(tokens: Any, *, config: PolicyLossConfig, selected: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return -tokens.advantages * tokens.log_probs, {"likely_fraction": tokens.log_probs > -3}

    silent = PolicyLoss(token_losses=plain, metrics=())
    with pytest.raises(ValueError, match=r"declares the metrics \(\) and reports \('likely_fraction',\)"):
        silent(**batch, config=PolicyLossConfig())
    before = loss_metrics()
    assert before == ("clip_fraction", "dual_clip_fraction", "selected_fraction", "kl_old")
    monkeypatch.setitem(POLICY_LOSSES, "plain", replace(silent, metrics=("likely_fraction",)))
    assert set(loss_metrics()) == {*before, "likely_fraction"}
    assert POLICY_LOSSES["plain"](**batch, config=PolicyLossConfig())[1].keys() == {"likely_fraction", "kl_old"}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_detached_scalars(batch: Batch, name: str) -> None:
    log_probs = batch["log_probs"].clone().requires_grad_()
    _, metrics = POLICY_LOSSES[name](**batch | {"log_probs": log_probs}, config=make_config("token-mean"))
    assert {"clip_fraction", "kl_old"} <= metrics.keys()
    for value in metrics.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_reads_no_padding(batch: Batch, mode: str) -> None:
    loss = batch["log_probs"].masked_fill(~batch["response_mask"], 1e30).requires_grad_()
    total = aggregate(loss, batch["response_mask"].float(), mode=mode)
    total.backward()
    torch.testing.assert_close(total, aggregate(batch["log_probs"], batch["response_mask"], mode=mode))
    assert loss.grad is not None
    assert (loss.grad[~batch["response_mask"]] == 0).all()


def test_aggregation_sums_in_fp32() -> None:
    loss = torch.ones(1, 1000, dtype=torch.bfloat16)
    total = aggregate(loss, torch.ones(1, 1000), mode="seq-mean-token-sum")
    assert total.dtype == torch.float32
    assert total == 1000


def test_kl_estimators() -> None:
    log_probs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    r = ref - log_probs
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k1"), -r)
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k2"), r**2 / 2)
    torch.testing.assert_close(kl_penalty(log_probs, ref, kind="k3"), r.exp() - 1 - r)
    assert (kl_penalty(log_probs, ref, kind="k3") >= 0).all()


def test_k3_is_bounded() -> None:
    """At 10, and there it has no gradient; k1 and k2 have no bound."""
    log_probs = torch.tensor([-100.0, -5.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0, -1.0, -1.0])
    kl = kl_penalty(log_probs, ref, kind="k3")
    kl.sum().backward()
    assert kl.tolist() == [10.0, 10.0, 0.0]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [0.0, 0.0, 0.0]
    assert kl_penalty(log_probs, ref, kind="k2")[0] == 99.0**2 / 2


def test_kl_estimators_agree_on_average() -> None:
    """k1 and k3 are unbiased: their expectation under the policy is the exact KL."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_penalty(p.log(), q.log(), kind=kind)).sum(), exact)


@pytest.mark.parametrize(
    "bad",
    [
        {"clip_low": 0.0},
        {"clip_high": -0.1},
        {"clip_high": math.nan},
        {"dual_clip": 1.0},
        {"kl_cov_ratio": 0.0},
        {"kl_cov_ratio": 1.5},
        {"kl_cov_coef": -1.0},
        {"clip_cov_ratio": -0.1},
        {"clip_cov_lower": 5.0},
        {"clip_cov_upper": 0.5},
        {"aggregation": "mean"},
    ],
)
def test_bad_config_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PolicyLossConfig(**bad)


def test_bad_inputs_are_refused(batch: Batch) -> None:
    log_probs, mask = batch["log_probs"], batch["response_mask"]
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(log_probs, log_probs, kind="k4")
    with pytest.raises(ValueError, match="token-sum"):
        aggregate(log_probs, mask, mode="token-sum")
    with pytest.raises(ValueError, match="one shape"):
        aggregate(log_probs, mask[:, :1], mode="token-mean")
    with pytest.raises(ValueError, match="all tokens alike"):
        POLICY_LOSSES["grpo"](**batch, config=PolicyLossConfig(), selected=mask)
    with pytest.raises(ValueError, match="one shape"):
        POLICY_LOSSES["kl-cov"](**batch, config=PolicyLossConfig(), selected=mask[:1])
    with pytest.raises(ValueError, match="one shape"):
        POLICY_LOSSES["grpo"](**batch, config=PolicyLossConfig(), importance_weights=torch.ones(B, 1))
