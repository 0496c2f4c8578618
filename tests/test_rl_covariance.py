"""Which tokens KL-Cov and Clip-Cov select, against plain loops, within a batch and over a global one."""

import pytest
import torch
from torch import Tensor

from megatron_longact.rl import POLICY_LOSSES, PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.covariance import share_of_tokens

N, R = 40, 12

Batch = dict[str, Tensor]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(11)
    log_probs = torch.randn(N, R, generator=generator) * 2 - 3
    lengths = torch.randint(0, R + 1, (N,), generator=generator)
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.3 * torch.randn(N, R, generator=generator),
        "advantages": torch.randn(N, generator=generator),
        "response_mask": torch.arange(R) < lengths[:, None],
    }


def naive_covariances(batch: Batch) -> dict[tuple[int, int], float]:
    tokens = [(i, t) for i, t in batch["response_mask"].nonzero().tolist()]
    advantage = {(i, t): float(batch["advantages"][i]) for i, t in tokens}
    log_prob = {(i, t): float(batch["log_probs"][i, t]) for i, t in tokens}
    mean_advantage = sum(advantage.values()) / len(tokens)
    mean_log_prob = sum(log_prob.values()) / len(tokens)
    return {at: (advantage[at] - mean_advantage) * (log_prob[at] - mean_log_prob) for at in tokens}


def positions(selected: Tensor | None) -> set[tuple[int, int]]:
    assert selected is not None
    return {(i, t) for i, t in selected.nonzero().tolist()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ratio", [1e-6, 0.0002, 0.1, 1.0])
def test_kl_cov_takes_the_largest_covariances(batch: Batch, ratio: float) -> None:
    covariances = naive_covariances(batch)
    count = max(int(ratio * len(covariances)), 1)
    expected = set(sorted(covariances, key=lambda at: -covariances[at])[:count])
    config = PolicyLossConfig(kl_cov_ratio=ratio)
    assert positions(POLICY_LOSSES["kl-cov"].select(**batch, config=config)) == expected


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 1.0])
def test_clip_cov_draws_from_those_that_qualify(batch: Batch, ratio: float) -> None:
    config = PolicyLossConfig(clip_cov_ratio=ratio, clip_cov_lower=0.5, clip_cov_upper=3.0)
    candidates = set()
    covariances = naive_covariances(batch)
    for (i, t), covariance in covariances.items():
        ratio_to_old = float((batch["log_probs"][i, t] - batch["old_log_probs"][i, t]).exp())
        clipped = ratio_to_old > 1.2 if batch["advantages"][i] > 0 else ratio_to_old < 0.8
        if 0.5 < covariance < 3.0 and not clipped:
            candidates.add((i, t))
    count = min(max(int(ratio * len(covariances)), 1), len(candidates))
    draws = [positions(POLICY_LOSSES["clip-cov"].select(**batch, config=config, generator=seeded(s))) for s in range(6)]
    for drawn in draws:
        assert len(drawn) == count
        assert drawn <= candidates
    if count < len(candidates):
        assert len(set().union(*draws)) > count


def test_clip_cov_is_reproducible(batch: Batch) -> None:
    config = PolicyLossConfig(clip_cov_ratio=0.05, clip_cov_lower=-1.0)
    select = POLICY_LOSSES["clip-cov"].select
    first = positions(select(**batch, config=config, generator=seeded(1)))
    assert positions(select(**batch, config=config, generator=seeded(1))) == first
    assert positions(select(**batch, config=config, generator=seeded(2))) != first
    state = torch.get_rng_state()
    select(**batch, config=config, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["kl-cov", "clip-cov"])
def test_selection_does_not_depend_on_the_padding(batch: Batch, name: str) -> None:
    """Neither on what stands there nor on how wide it is."""
    config = PolicyLossConfig(kl_cov_ratio=0.1, clip_cov_ratio=0.1, clip_cov_lower=0.0)
    mask = batch["response_mask"]
    wide = {key: torch.nn.functional.pad(value, (0, 7)) for key, value in batch.items() if value.dim() == 2}
    wide["log_probs"] = wide["log_probs"].masked_fill(~wide["response_mask"], 1e30)
    wide["old_log_probs"] = wide["old_log_probs"].masked_fill(~wide["response_mask"], -1e30)
    select = POLICY_LOSSES[name].select
    narrow = select(**batch, config=config, generator=seeded(1))
    widened = select(**batch | wide, config=config, generator=seeded(1))
    assert positions(widened) == positions(narrow)
    assert not (narrow & ~mask).any()


@pytest.mark.parametrize("name", ["kl-cov", "clip-cov"])
def test_a_global_batch_is_not_the_sum_of_its_parts(batch: Batch, name: str) -> None:
    """Selecting within each part gives other tokens: the loss has to be told the whole batch's."""
    config = PolicyLossConfig(kl_cov_ratio=0.1, clip_cov_ratio=0.1, clip_cov_lower=0.0)
    select = POLICY_LOSSES[name].select
    whole = positions(select(**batch, config=config, generator=seeded(1)))
    parts = set()
    for start in range(0, N, 8):
        part = {key: value[start : start + 8] for key, value in batch.items()}
        parts |= {(start + i, t) for i, t in positions(select(**part, config=config, generator=seeded(1)))}
    assert parts != whole


@pytest.mark.parametrize("name", ["kl-cov", "clip-cov"])
def test_without_a_selection_the_batch_selects_for_itself(batch: Batch, name: str) -> None:
    """With torch's own generator, so that one seed gives one loss."""
    config = PolicyLossConfig(kl_cov_ratio=0.1, clip_cov_ratio=0.1, clip_cov_lower=0.0)
    torch.manual_seed(1)
    selected = POLICY_LOSSES[name].select(**batch, config=config)
    given = POLICY_LOSSES[name](**batch, config=config, selected=selected)
    torch.manual_seed(1)
    own = POLICY_LOSSES[name](**batch, config=config)
    assert own[0] == given[0]
    assert own[1] == given[1]
    tokens = batch["response_mask"].sum()
    assert own[1]["selected_fraction"].item() == pytest.approx(float(selected.sum() / tokens))


def test_losses_without_selection_say_so(batch: Batch) -> None:
    for name in ("grpo", "dapo", "gspo", "cispo"):
        assert POLICY_LOSSES[name].select(**batch, config=PolicyLossConfig()) is None


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"), [(0, 0.5, 0), (1, 0.1, 1), (9, 0.25, 2), (5000, 2e-4, 1), (3, 1.0, 3)]
)
def test_share_of_tokens(tokens: int, ratio: float, count: int) -> None:
    assert share_of_tokens(tokens, ratio) == count
