"""Everything that would defeat LongAct silently is refused by name, and nothing is left behind."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_longact import LongAct, LongActConfig
from megatron_longact.megatron_training import check_args
from tests import ranks
from tests.models import ModelSpec, build

FLAGS = {
    "qk_clip": (True, "--qk-clip"),
    "optimizer_cuda_graph": (True, "--optimizer-cuda-graph"),
    "cuda_graph_impl": ("full_iteration", "--cuda-graph-impl full_iteration"),
    "use_megatron_fsdp": (True, "--use-megatron-fsdp"),
    "use_torch_fsdp2": (True, "--use-torch-fsdp2"),
    "multi_latent_attention": (True, "--multi-latent-attention"),
    "overlap_moe_expert_parallel_comm": (True, "--overlap-moe-expert-parallel-comm"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flag_is_refused_with_longact_alone(name: str) -> None:
    value, flag = FLAGS[name]
    with pytest.raises(ValueError, match=f"does not work with {flag}") as error:
        check_args(Namespace(longact=True, **{name: value}))
    assert "\n" not in str(error.value)
    assert check_args(Namespace(longact=False, **{name: value})) is None


def test_tap_norm_needs_a_norm() -> None:
    given = {"longact": True, "longact_tap": "norm"}
    with pytest.raises(ValueError, match="needs --qk-layernorm"):
        check_args(Namespace(**given, qk_layernorm=False))
    with pytest.raises(ValueError, match="fused-single-qkv-rope"):
        check_args(Namespace(**given, qk_layernorm=True, fused_single_qkv_rope=True))
    assert check_args(Namespace(**given, qk_layernorm=True)) == LongActConfig(tap="norm")


class Unknown:
    """An optimizer that LongAct has never heard of."""

    is_stub_optimizer = False

    def __init__(self, inner: Any) -> None:
        self.optimizer, self.config = inner.optimizer, inner.config


class Adapted(nn.Module):
    """What LoRA makes of a projection."""

    def __init__(self, to_wrap: nn.Module) -> None:
        super().__init__()
        self.to_wrap = to_wrap


def refused(case: str) -> dict[str, Any]:
    built = build(ModelSpec())
    finalize = built.config.finalize_model_grads_func
    chunks, optimizer, config = built.chunks, built.optimizer, LongActConfig()
    layers = chunks[0].module.decoder.layers
    if case == "unknown optimizer":
        optimizer.chained_optimizers = [Unknown(optimizer.chained_optimizers[0])]
    elif case == "not in ddp":
        chunks = [chunks[0].module]
    elif case == "lora":
        layers[1].self_attention.linear_qkv = Adapted(layers[1].self_attention.linear_qkv)
    elif case == "no linear_qkv":
        for layer in layers:
            layer.self_attention = nn.Identity()
    elif case == "no trainable parameter":
        optimizer.chained_optimizers = []
    elif case in FLAGS:
        setattr(built.config if hasattr(built.config, case) else optimizer.config, case, FLAGS[case][0])
    try:
        LongAct.attach(chunks, optimizer, config)
        message = None
    except ValueError as error:
        message = str(error)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in built.chunks[0].modules())
    return {
        "message": message,
        "hooks": hooks,
        "clean": built.config.finalize_model_grads_func is finalize and LongAct.of(optimizer) is None,
    }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown optimizer", "does not know where Unknown keeps its master parameters"),
        ("not in ddp", "wrapped in megatron.core.distributed.DistributedDataParallel"),
        ("lora", "LoRA on linear_qkv is not supported"),
        ("no linear_qkv", "no rank holds a self_attention.linear_qkv"),
        ("no trainable parameter", "no trainable parameter"),
        ("qk_clip", "--qk-clip"),
        ("optimizer_cuda_graph", "--optimizer-cuda-graph"),
        ("multi_latent_attention", "--multi-latent-attention"),
    ],
)
def test_attach_refuses_in_one_line_and_leaves_nothing(case: str, message: str) -> None:
    result = ranks.run(refused, case=case)[0]
    assert message in result["message"]
    assert "\n" not in result["message"]
    assert result["hooks"] == 0
    assert result["clean"]


def other_shape() -> str:
    built = build(ModelSpec())
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig())
    state = longact.state_dict()
    state["layout"] = {**state["layout"], "kv_channels": 99}
    with pytest.raises(ValueError, match="this model") as error:
        longact.load_state_dict(state)
    return str(error.value)


def test_state_of_another_model_shape_is_refused() -> None:
    assert "kv_channels" in ranks.run(other_shape)[0]


def mismatch() -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    state = None
    for on_mismatch in ("error", "use-flags"):
        built = build(ModelSpec())
        config = LongActConfig(ratio=0.3 if state is None else 0.5, on_mismatch=on_mismatch)
        longact = LongAct.attach(built.chunks, built.optimizer, config)
        if state is None:
            state = longact.state_dict()
            longact.detach()
            longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(ratio=0.5, ema=0.5))
            with pytest.raises(ValueError, match="another LongAct configuration") as error:
                longact.load_state_dict(state)
            outcome["error"] = str(error.value)
        else:
            longact.load_state_dict({**state, "updates": 7})
            outcome["updates"] = longact.state.updates
    return outcome


def test_another_configuration_names_what_differs() -> None:
    result = ranks.run(mismatch)[0]
    assert "--longact-ratio 0.3 -> 0.5, --longact-ema 0.0 -> 0.5" in result["error"]
    assert "--longact-on-mismatch use-flags" in result["error"]
    assert result["updates"] == 7


def test_masks_are_plain_tensors_for_a_checkpoint() -> None:
    from tests.runs import train

    state = ranks.run(train, spec=ModelSpec(), config=LongActConfig(), steps=1)[0]["state"]
    assert torch.utils._pytree.tree_all(lambda v: isinstance(v, str | int | float | bool | torch.Tensor), state)
