"""Weights in FP8 are derived from the masters of all optimizers together, and wherever Megatron loaded others."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.optimizer_shards import chained, derive_quantized_weights
from tests import ranks
from tests.models import Built, ModelSpec, OptimizerSpec, build, random_tokens, train_step
from tests.ranks import Layout

EXPERTS = {"num_moe_experts": 4, "moe_token_dispatcher_type": "allgather", "moe_router_topk": 2}


def build_as_if_quantized(spec: ModelSpec, *, reuse_buffer: bool = False) -> Built:
    """In bf16, told that its weights are in FP8: Megatron then copies masters as it does for what is not quantised."""
    built = build(spec, OptimizerSpec(distributed=True))
    for one in chained(built.optimizer):
        one.ddp_config.fp8_param_gather = True
        one.config.reuse_grad_buf_for_mxfp8_param_ag = reuse_buffer
    return built


def weights_of(built: Built) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in built.chunks[0].named_parameters()}


@torch.no_grad()
def load_others(built: Built) -> None:
    for weight in built.chunks[0].parameters():
        weight.mul_(1.5)


def derive(reuse_buffer: bool) -> dict[str, Any]:
    """The order in which Megatron's own methods ran, and the weights that are not what the masters make of them."""
    built = build_as_if_quantized(ModelSpec(dtype="bf16", config=EXPERTS), reuse_buffer=reuse_buffer)
    calls: list[str] = []

    def noted(target: Any, name: str, as_: str) -> None:
        original = getattr(target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(as_)
            return original(*args, **kwargs)

        setattr(target, name, call)

    for one in chained(built.optimizer):
        noted(
            one, "_copy_main_params_to_param_buffer" if reuse_buffer else "_copy_main_params_to_model_params", "ready"
        )
    for chunk in built.chunks:
        noted(chunk, "start_param_sync", "sync")
    wanted = weights_of(built)
    load_others(built)
    derive_quantized_weights(built.optimizer)
    wrong = [name for name, weight in weights_of(built).items() if not torch.equal(weight, wanted[name])]
    return {"calls": calls, "wrong": wrong, "classes": [type(one).__name__ for one in chained(built.optimizer)]}


@pytest.mark.parametrize("reuse_buffer", [False, True])
def test_all_optimizers_are_ready_before_a_shared_chunk_is_synced_once(reuse_buffer: bool) -> None:
    for seen in ranks.run(derive, layout=Layout(ep=2), world_size=2, reuse_buffer=reuse_buffer):
        assert seen["classes"] == ["DistributedOptimizer"] * 2  # dense and experts
        assert seen["calls"] == ["ready", "ready", "sync"]
        assert seen["wrong"] == []


def reload_the_model() -> dict[str, bool]:
    """As Megatron's RL loop loads weights alone, once LongAct has resumed; whether they are the masters' then."""
    from megatron_longact.megatron import seams

    built = build_as_if_quantized(ModelSpec(dtype="bf16"))
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig())
    load = seams._reloading(lambda *_: load_others(built), [longact])
    are_the_masters: dict[str, bool] = {}
    for case, updates, given, finetune in (
        ("resumed", 1, None, False),
        ("resumed, the start weights", 1, None, True),
        ("resumed, with the optimizer", 1, built.optimizer, False),
        ("fresh", 0, None, False),
    ):
        if updates and not longact.state.updates:
            train_step(built, random_tokens(2, 32))
        longact.load_state_dict({**longact.state_dict(), "updates": updates})
        wanted = weights_of(built)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(seams, "get_args", lambda finetune=finetune: Namespace(finetune=finetune))
            load(built.chunks, given, None)
        now = weights_of(built)
        are_the_masters[case] = all(torch.equal(weight, wanted[name]) for name, weight in now.items())
    return are_the_masters


def test_weights_that_are_loaded_again_are_derived_again() -> None:
    pytest.importorskip("megatron.training")
    assert ranks.run(reload_the_model)[0] == {
        "resumed": True,
        "resumed, the start weights": False,
        "resumed, with the optimizer": False,
        "fresh": False,
    }
