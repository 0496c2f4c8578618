"""What the moments of a frozen row do, and that the row trains on sensibly when it comes back."""

from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import name_all

BETA1, BETA2 = 0.9, 0.999


def frozen_moments(moments: str, optimizer: OptimizerSpec) -> list[dict[str, float]]:
    """For each step but the first: how the moments of frozen elements compare with those before the step."""
    built = build(ModelSpec(), optimizer)
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(moments=moments, select="random"))
    seen: list[dict[str, float]] = []
    for step in range(4):
        states = [(f, s, f.inner.state.get(s.inner_parameter, {})) for f in longact.freezes for s in f.shards]
        before = [{k: v.clone() for k, v in state.items() if k.startswith("exp_avg")} for *_, state in states]
        assert train_step(built, random_tokens(2, 32, seed=step), before_forward=name_all(longact))[0]
        if step == 0:
            continue
        worst = {"held": 0.0, "decayed": 0.0, "zero": 0.0}
        for (_, shard, state), old in zip(states, before, strict=True):
            for name, beta in (("exp_avg", BETA1), ("exp_avg_sq", BETA2)):
                new_parts, old_parts = (
                    shard.parts(state[name], longact.step.frozen),
                    shard.parts(old[name], longact.step.frozen),
                )
                for (new, rows), (was, _) in zip(new_parts, old_parts, strict=True):
                    worst["held"] = max(worst["held"], float((new[rows] - was[rows]).abs().max()))
                    off = (new[rows] - beta * was[rows]).abs() / (was[rows].abs() + 1e-30)
                    worst["decayed"] = max(worst["decayed"], float(off.max()))
                    worst["zero"] = max(worst["zero"], float(new[rows].abs().max()))
        seen.append(worst)
    return seen


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("moments", ["decay", "hold", "reset"])
def test_moments_of_frozen_rows(moments: str, distributed: bool) -> None:
    optimizer = OptimizerSpec(distributed=distributed)
    for result in ranks.run(frozen_moments, layout=Layout(tp=2), world_size=4, moments=moments, optimizer=optimizer):
        for worst in result:
            assert (worst["held"] == 0.0) == (moments == "hold")
            assert (worst["zero"] == 0.0) == (moments == "reset")
            if moments == "decay":
                assert worst["decayed"] < 1e-6


def returning(moments: str) -> dict[str, Any]:
    """Train on, and compare the update of rows that come back with that of rows that stayed."""
    built = build(ModelSpec(layers=2), OptimizerSpec(lr=1e-3, weight_decay=0.0, eps=1e-8))
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(moments=moments, select="random"))
    [weight] = longact.model.layers[0].weights
    returned, stayed, was = [], [], None
    for step in range(30):
        old = weight.detach().clone()
        train_step(built, random_tokens(2, 64, seed=step), before_forward=name_all(longact))
        frozen = torch.zeros(weight.shape[0], dtype=torch.bool)
        frozen[longact.step.frozen[weight].device] = True
        size = (weight.detach() - old).abs().mean(1) / 1e-3  # in units of the learning rate
        if was is not None and step >= 10:
            returned.append(size[was & ~frozen])
            stayed.append(size[~was & ~frozen & longact_rows(longact)])
        was = frozen
    return {"returned": float(torch.cat(returned).mean()), "stayed": float(torch.cat(stayed).mean())}


def longact_rows(longact: LongAct) -> torch.Tensor:
    """The local rows that are Q or K."""
    [weight] = longact.model.layers[0].weights
    rows = torch.zeros(weight.shape[0], dtype=torch.bool)
    rows[longact.model.frozen_rows(longact.model.channels(False))[weight].device] = True
    return rows


@pytest.mark.parametrize("moments", ["decay", "hold", "reset"])
def test_a_row_that_comes_back_moves_by_no_more_than_the_learning_rate_allows(moments: str) -> None:
    sizes = ranks.run(returning, moments=moments)[0]
    assert 0 < sizes["returned"] < 10.0  # Adam's own first step is 1 / sqrt(1 - beta2) = 32 at the very most
    assert sizes["stayed"] < 2.0
    print(moments, sizes)
