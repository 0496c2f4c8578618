"""What a step leaves that is skipped, fails or sees nothing, and what is said of a layer that cannot be read."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor

from megatron_longact import LongAct, LongActConfig, metrics
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import cpu, name_all, same, take_step, with_longact

SPEC = ModelSpec()


def skipped_steps(spec: ModelSpec, optimizer: OptimizerSpec) -> dict[str, Any]:
    built, longact = with_longact(spec, LongActConfig(ema=0.5), optimizer)
    assert take_step(built, longact, 0)
    state, weights = longact.state, full_weights(built)
    outcomes = []
    for seed in (1, 2):
        config = built.optimizer.chained_optimizers[0].config
        if spec.dtype == "fp16":
            scaler = built.optimizer.chained_optimizers[0].grad_scaler
            scaler._scale.fill_(2.0**40)
        else:
            config.grad_norm_skip_threshold = 1e-9
        outcomes.append(take_step(built, longact, seed))
        outcomes.append(longact.state is state)
    outcomes.append(all(torch.equal(w, weights[n]) for n, w in full_weights(built).items()))
    if spec.dtype == "fp16":
        scaler._scale.fill_(1024.0)
    config.grad_norm_skip_threshold = float("inf")
    outcomes.append(take_step(built, longact, 3))
    fresh_built, fresh = with_longact(spec, LongActConfig(ema=0.5), optimizer)
    take_step(fresh_built, fresh, 0)
    take_step(fresh_built, fresh, 3)
    return {
        "outcomes": outcomes,
        "updates": longact.state.updates,
        "as if never": same(cpu(longact.saliency), cpu(fresh.saliency)) and same(cpu(longact.masks), cpu(fresh.masks)),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_skipped_step_leaves_everything_as_it_was(dtype: str, distributed: bool) -> None:
    if dtype == "bf16" and not hasattr(OptimizerConfig, "grad_norm_skip_threshold"):
        pytest.skip("this Megatron skips no step of bf16")
    optimizer = OptimizerSpec(distributed=distributed, config={"initial_loss_scale": 1024.0} if dtype == "fp16" else {})
    run = {"layout": Layout(tp=2), "world_size": 4}
    for result in ranks.run(skipped_steps, **run, spec=ModelSpec(dtype=dtype), optimizer=optimizer):
        assert result["outcomes"] == [False, True, False, True, True, True]
        assert result["updates"] == 2
        assert result["as if never"]


def broken_refresh(bad_rank: int) -> dict[str, Any]:
    """NaN in one rank's activations, then a refresh without a counted token, then a good one."""
    built, longact = with_longact(config=LongActConfig(ema=0.5))
    none = {"before_forward": lambda inputs: longact.set_tokens(torch.zeros_like(inputs, dtype=torch.bool))}
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    before = full_weights(built)[name]
    take_step(built, longact, 0, **none)
    rows = torch.cat([longact.model.layout.q_rows, longact.model.layout.k_rows])
    no_mask_no_update = torch.equal(full_weights(built)[name][rows], before[rows])
    unused = [longact.state.rejected, bool(longact.masks)]
    take_step(built, longact, 1)
    masks, saliency = cpu(longact.masks), cpu(longact.saliency)
    projection = built.chunks[-1].module.decoder.layers[-1].self_attention.linear_qkv

    right: list[Any] = []

    def spoil(module: Any, args: Any, output: Any) -> tuple[Tensor, Any]:
        right.append(output)
        return torch.where(torch.arange(output[0].shape[-1]) == 0, float("nan"), output[0]), output[1]

    with ExitStack() as stack:
        if torch.distributed.get_rank() == bad_rank:  # LongAct's hook sees NaN, the model does not
            for handle in (
                projection.register_forward_hook(spoil, prepend=True),
                projection.register_forward_hook(lambda *_: right.pop()),
            ):
                stack.callback(handle.remove)
        take_step(built, longact, 2)
    kept = same(masks, cpu(longact.masks)) and same(saliency, cpu(longact.saliency))
    rejected = longact.metrics()["longact/rejected_refreshes"]
    take_step(built, longact, 3)
    return {
        "no mask, no update": no_mask_no_update,
        "unused": unused,
        "kept": kept,
        "rejected": rejected,
        "moved on": not same(saliency, cpu(longact.saliency)),
        "updates": longact.state.updates,
    }


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_an_empty_or_broken_refresh_keeps_the_mask_on_every_rank(layout: Layout) -> None:
    for result in ranks.run(broken_refresh, layout=layout, world_size=4, bad_rank=3):
        assert result["no mask, no update"]
        assert result["unused"] == [1, False]
        assert result["kept"]
        assert result["rejected"] == 2
        assert result["moved on"]
        assert result["updates"] == 4


def gradients_that_say_nothing() -> dict[str, Any]:
    """By gradient: one step in which all are zero, then two others; and the same at another scale of the loss."""
    scaled = {}
    for scale in (1024.0, 4096.0):
        built = build(ModelSpec(dtype="fp16"), OptimizerSpec(config={"initial_loss_scale": scale}))
        longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(select="gradient"))
        take_step(built, longact)
        scaled[scale] = cpu(longact.saliency)
    built = build(SPEC)
    finalize = built.config.finalize_model_grads_func
    factors = iter((0.0, 1.0, 1.0))

    def times_a_factor(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        built.chunks[0].scale_gradients(next(factors))

    built.config.finalize_model_grads_func = times_a_factor
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(select="gradient"))
    masks = []
    for seed in range(3):
        take_step(built, longact, seed)
        masks.append(cpu(longact.masks))
    return {"scaled": scaled, "masks": masks, "rejected": longact.state.rejected}


def test_gradients_of_zero_choose_nothing_and_the_scale_of_the_loss_changes_nothing() -> None:
    [result] = ranks.run(gradients_that_say_nothing)
    nothing, first, second = result["masks"]
    assert nothing == {}
    assert result["rejected"] == 1
    assert not same(first, second)
    a, b = result["scaled"].values()
    for layer in a:
        torch.testing.assert_close(a[layer]["q"], b[layer]["q"], rtol=2e-2, atol=0)


def lonely_finalize() -> str:
    built, longact = with_longact()
    built.config.finalize_model_grads_func = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError) as error:
        take_step(built, longact)
    return str(error.value)


def test_a_replaced_finalize_function_is_noticed() -> None:
    assert "finalize_model_grads_func was replaced" in ranks.run(lonely_finalize)[0]


def unread() -> str:
    """What is said when the last layer's projection runs without its hooks, from the second step on."""
    built, longact = with_longact()
    take_step(built, longact)
    built.chunks[-1].module.decoder.layers[-1].self_attention.linear_qkv._forward_hooks.clear()
    with pytest.raises(RuntimeError) as error:
        take_step(built, longact, seed=1)
    assert longact.state.updates == 1
    return str(error.value)


def test_a_layer_that_cannot_be_read_is_an_error() -> None:
    """As torch.compile(fullgraph=True), a graph or another module in its place would have it."""
    said = ranks.run(unread)[0]
    assert "could not read Q and K of layers [2]" in said
    assert "torch.compile" in said


def after_faults() -> dict[str, Any]:
    """A forward and an optimizer's step that raise; weights below 0; NaN of one rank's maximum; metrics asked early."""
    results: dict[str, Any] = {}
    built, longact = with_longact(config=LongActConfig(statistic="max-abs"))
    take_step(built, longact)
    masks = longact.active
    projection = built.chunks[0].module.decoder.layers[1].self_attention.linear_qkv

    def fail(*_: Any) -> None:
        raise ArithmeticError("a forward, or a step, that fails")

    failing = projection.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        take_step(built, longact, seed=1)
    failing.remove()
    take_step(built, longact, seed=1)
    results["tokens after a forward that failed"] = longact.step.tokens.tolist()

    inner = longact.freezes[0].inner
    failing = inner.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        take_step(built, longact, seed=2)
    failing.remove()
    before = full_weights(built)
    take_step(built, longact, seed=3)
    weight = "decoder.layers.0.self_attention.linear_qkv.weight"
    moved = (full_weights(built)[weight] != before[weight]).any(1)
    active = longact.model.layout.fused(longact.active.q[0], longact.active.k[0], fill=True)
    results["rows moved after a step that failed"] = torch.equal(moved, active)

    rejected = longact.state.rejected
    negative = torch.arange(32)[None] - 9.0
    take_step(built, longact, before_forward=lambda inputs: longact.set_tokens(negative))
    results["weights below 0"] = longact.state.rejected - rejected
    spoilt = projection.register_forward_hook(lambda m, a, out: (out[0] * float("nan"), out[1]), prepend=True)
    if torch.distributed.get_rank() == 0:
        spoilt.remove()
    train_step(built, random_tokens(2, 32), before_forward=name_all(longact), step=False)
    spoilt.remove()
    results["NaN of one rank"] = longact.step.pending.rejected - longact.state.rejected
    take_step(built, longact, seed=4)
    early = longact.metrics()
    longact.load_state_dict({**longact.state_dict(), "refreshes": 77})
    results["metrics after a load"] = longact.metrics()[metrics.REFRESHES], early[metrics.REFRESHES] < 77
    assert masks is not longact.active
    return results


def test_what_went_wrong_leaves_nothing_in_the_next_step() -> None:
    for result in ranks.run(after_faults, world_size=2):
        assert result == {
            "tokens after a forward that failed": [32, 32],
            "rows moved after a step that failed": True,
            "weights below 0": 1,
            "NaN of one rank": 1,
            "metrics after a load": (77, True),
        }
