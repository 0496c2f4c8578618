"""Everything that would defeat LongAct silently is refused by name, and nothing is left behind."""

from argparse import Namespace
from inspect import signature
from typing import Any

import pytest
import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_longact import LongAct, LongActConfig
from megatron_longact.refusals import check_settings
from megatron_longact.versions import installed
from tests import ranks
from tests.models import Built, ModelSpec, OptimizerSpec, build, random_tokens, train_step

FLAGS = {
    "qk_clip": (True, "--qk-clip"),
    "optimizer_cuda_graph": (True, "--optimizer-cuda-graph"),
    "cuda_graph_impl": ("full_iteration", "--cuda-graph-impl full_iteration"),
    "use_megatron_fsdp": (True, "--use-megatron-fsdp"),
    "tensor_parallel_num_weight_shards": (2, "--tensor-parallel-num-weight-shards"),
    "use_torch_fsdp2": (True, "--use-torch-fsdp2"),
    "experimental_attention_variant": ("dsa", "--experimental-attention-variant dsa"),
    "hybrid_context_parallel": (True, "--hybrid-context-parallel"),
    "overlap_moe_expert_parallel_comm": (True, "--overlap-moe-expert-parallel-comm"),
    "rl_training_cuda_graphs": (True, "--rl-training-cuda-graphs"),
    "optimizer": ("muon", "--optimizer muon"),
    "use_layer_wise_distributed_optimizer": (True, "Megatron's layer-wise distributed optimizer"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flag_is_refused_with_longact_alone(name: str) -> None:
    value, flag = FLAGS[name]
    check_args = pytest.importorskip("megatron_longact.megatron.seams", exc_type=ImportError).check_args
    with pytest.raises(ValueError, match=f"does not work with {flag}") as error:
        check_args(Namespace(longact=True, **{name: value}))
    assert "\n" not in str(error.value)
    assert check_args(Namespace(longact=False, **{name: value})) is None


@pytest.mark.parametrize("name", ["dist_muon", "adaptive_muon", "soap", "one of their own"])
def test_optimizers_that_mix_rows_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"does not work with --optimizer {name}: it orthogonalises"):
        check_settings(Namespace(optimizer=name))
    for elementwise in ("adam", "sgd"):
        check_settings(Namespace(optimizer=elementwise))


def test_optimizers_whose_views_of_the_weights_would_be_lost_are_not_offloaded() -> None:
    offloaded = {"rl_offload_optimizer_during_inference": True}
    for given in ({"bf16": True, "use_precision_aware_optimizer": True}, {}):
        with pytest.raises(ValueError, match="--rl-offload-optimizer-during-inference with --use-precision-aware-"):
            check_settings(Namespace(**offloaded, **given))
    check_settings(Namespace(**offloaded, bf16=True))
    check_settings(Namespace(bf16=True, use_precision_aware_optimizer=True))


def what_the_optimizer_steps() -> dict[str, bool]:
    """Whether it is a view of the model's weight, which Megatron's offload to the host replaces by a copy."""
    views = {}
    for dtype in ("fp32", "bf16"):
        built = build(ModelSpec(dtype=dtype), OptimizerSpec(distributed=True))
        [one] = built.optimizer.chained_optimizers
        weights = {weight.untyped_storage().data_ptr() for weight in built.chunks[0].parameters()}
        stepped = [p for group in one.optimizer.param_groups for p in group["params"]]
        views[dtype] = any(p.untyped_storage().data_ptr() in weights for p in stepped)
    return views


def test_megatron_steps_views_of_weights_that_are_their_own_masters() -> None:
    assert ranks.run(what_the_optimizer_steps)[0] == {"fp32": True, "bf16": False}


WHOLE = "--cuda-graph-impl full_iteration"
ATTENTION = "--cuda-graph-impl transformer_engine over attention"
BLOCKING: dict[str, tuple[dict[str, Any], str | None]] = {
    "graphs of whole layers": ({"cuda_graph_impl": "transformer_engine"}, ATTENTION),
    "of attention": ({"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn"]}, ATTENTION),
    "of attention among others": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": "mlp,attn"},
        ATTENTION,
    ),
    "of the mlp": ({"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["mlp"]}, None),
    "by the old name": ({"external_cuda_graph": True}, ATTENTION),
    "by the old names": ({"external_cuda_graph": True, "cuda_graph_scope": "attn"}, ATTENTION),
    "of the mlp by the old names": ({"external_cuda_graph": True, "cuda_graph_scope": "mlp"}, None),
    "of the iteration": ({"cuda_graph_impl": "full_iteration"}, WHOLE),
    "of the iteration by the old name": ({"cuda_graph_modules": "full_iteration"}, WHOLE),
    "of the iteration by the oldest name": ({"cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"}, WHOLE),
    "for rollouts": ({"cuda_graph_impl": "local"}, None),
    "for rollouts by the old name": ({"enable_cuda_graph": True}, None),
    "offloaded activations": ({"cpu_offloading": True, "cpu_offloading_num_layers": 1}, None),
    "offloaded inputs": ({"fine_grained_activation_offloading": True, "offload_modules": ["qkv_linear"]}, None),
}


if not hasattr(TransformerConfig, "cuda_graph_modules"):  # until megatron-core 0.17
    del BLOCKING["of the iteration"], BLOCKING["of the iteration by the old name"]
    for settings, _ in BLOCKING.values():
        settings |= {"cuda_graph_scope": settings.pop("cuda_graph_modules")} if "cuda_graph_modules" in settings else {}


def refusals_of_configs() -> dict[str, str | None]:
    """What LongAct says to each, after Megatron's own TransformerConfig accepted it."""
    said: dict[str, str | None] = dict.fromkeys(BLOCKING)
    for case, (settings, _) in BLOCKING.items():
        config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **settings)
        try:
            check_settings(config)
        except ValueError as error:
            said[case] = str(error)
    return said


def refusals_of_flags(flags: list[list[str]]) -> list[str | None]:
    """The same for Megatron's own parser, before Megatron has put the old names into new ones."""
    from megatron.training.arguments import parse_args

    said: list[str | None] = []
    for argv in flags:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py", *argv])
            args = parse_args()
        try:
            check_settings(args)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


def test_cuda_graphs_that_would_replay_attention_are_refused_under_all_their_names() -> None:
    for case, said in ranks.run(refusals_of_configs)[0].items():
        refused = BLOCKING[case][1]
        assert (said is None) == (refused is None), case
        assert refused is None or said.startswith(f"LongAct does not work with {refused}: "), case


def test_the_same_flags_are_refused_before_megatron_validates_them() -> None:
    if installed() < (0, 18):
        pytest.skip("these flags are not there yet")
    flags = {
        "--cuda-graph-impl transformer_engine": ATTENTION,
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp": ATTENTION,
        "--cuda-graph-impl transformer_engine --cuda-graph-modules mlp": None,
        "--external-cuda-graph": ATTENTION,
        "--external-cuda-graph --cuda-graph-scope mlp": None,
        "--cuda-graph-scope full_iteration": WHOLE,
        "--cuda-graph-impl local": None,
        "--use-precision-aware-optimizer --fp8-format hybrid --fp8-param-gather": "--use-precision-aware-optimizer",
        "--use-precision-aware-optimizer --fp8-format hybrid --fp8-param-gather --fp8-recipe tensorwise": None,
        "--use-precision-aware-optimizer --fp8-format hybrid": None,
        "--fp8-format hybrid --fp8-param-gather": None,
    }
    said = ranks.run(refusals_of_flags, flags=[f.split() for f in flags])[0]
    for (given, refused), answer in zip(flags.items(), said, strict=True):
        assert (answer is None) == (refused is None), given
        assert refused is None or f"does not work with {refused}" in answer, given


class Replay(nn.Module):
    """What Megatron puts on a layer for `--cuda-graph-impl local`; this one captures nothing."""

    def forward(self, layer: Any, args: Any, kwargs: Any) -> Any:
        return layer.forward(*args, **kwargs)


def train_with_graph_managers() -> list[Any]:
    outcome: list[Any] = []
    for select in ("high", "random"):
        built = build(ModelSpec())
        layer = built.chunks[0].module.decoder.layers[1]
        with LongAct.attach(built.chunks, built.optimizer, LongActConfig(select=select)) as longact:
            layer.cudagraph_manager = Replay()
            try:
                train_step(built, random_tokens(2, 16))
            except ValueError as error:
                outcome.append(str(error))
                del layer.cudagraph_manager
                train_step(built, random_tokens(2, 16))
            outcome.append(longact.state.updates)
    return outcome


def test_layers_with_a_graph_of_their_own_are_refused_when_they_train() -> None:
    message, after, random = ranks.run(train_with_graph_managers)[0]
    assert "--cuda-graph-impl local in training" in message
    assert (after, random) == (1, 1)


def weight_gradients_that_come_later() -> str:
    with pytest.raises(AssertionError) as error:
        TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, delay_wgrad_compute=True)
    return str(error.value)


def test_megatron_delays_weight_gradients_only_with_what_longact_refuses() -> None:
    assert "overlap_moe_expert_parallel_comm must be enabled" in ranks.run(weight_gradients_that_come_later)[0]


def test_tap_norm_needs_a_norm() -> None:
    check_args = pytest.importorskip("megatron_longact.megatron.seams", exc_type=ImportError).check_args
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


def layer_wise(built: Built) -> LayerWiseDistributedOptimizer:
    """Megatron's own, over an Adam as it makes one for what Muon does not step."""
    groups = [{"params": list(built.chunks[0].parameters()), "is_expert_parallel": False}]
    given: dict[str, Any] = {"model_chunks": built.chunks}  # from megatron-core 0.18 on
    return LayerWiseDistributedOptimizer(
        [torch.optim.AdamW(groups)],
        built.optimizer.config,
        ProcessGroupCollection.use_mpu_process_groups(),
        [lambda *_: None],
        **{name: v for name, v in given.items() if name in signature(LayerWiseDistributedOptimizer).parameters},
    )


def refused(case: str) -> dict[str, Any]:
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8} if case.endswith(("latents", "up-projection")) else None
    built = build(ModelSpec(dtype="bf16" if case.endswith("layer-wise") else "fp32", mla=mla))
    finalize = built.config.finalize_model_grads_func
    chunks, optimizer, config = built.chunks, built.optimizer, LongActConfig()
    module = chunks[0].module
    layers = getattr(module, "module", module).decoder.layers  # Float16Module lies around a bf16 model
    if case == "unknown optimizer":
        optimizer.chained_optimizers = [Unknown(optimizer.chained_optimizers[0])]
    elif case == "layer-wise":
        optimizer = layer_wise(built)
    elif case == "chained layer-wise":
        optimizer = ChainedOptimizer([layer_wise(built), *optimizer.chained_optimizers])
    elif case == "not in ddp":
        chunks = [chunks[0].module]
    elif case == "lora":
        layers[1].self_attention.linear_qkv = Adapted(layers[1].self_attention.linear_qkv)
    elif case == "lora on an up-projection":
        layers[0].self_attention.linear_kv_up_proj = Adapted(layers[0].self_attention.linear_kv_up_proj)
    elif case == "qk_clip with latents":
        built.config.qk_clip = True
    elif case == "norms of latents":
        config = LongActConfig(tap="norm")
    elif case == "no linear_qkv":
        for layer in layers:
            layer.self_attention = nn.Identity()
    elif case == "scaled moments":
        optimizer.chained_optimizers[0].optimizer.exp_avg_sq_dtype = torch.float16  # as TE's FusedAdam says it
        config = LongActConfig(moments="hold")
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
        ("layer-wise", "does not know where LayerWiseDistributedOptimizer keeps its master parameters"),
        ("chained layer-wise", "does not know where LayerWiseDistributedOptimizer keeps its master parameters"),
        ("optimizer", "--optimizer muon"),
        ("not in ddp", "wrapped in megatron.core.distributed.DistributedDataParallel"),
        ("lora", "LoRA on linear_qkv is not supported"),
        ("no linear_qkv", "no rank holds a self_attention.linear_qkv"),
        ("no trainable parameter", "no trainable parameter"),
        ("scaled moments", "with --exp-avg-sq-dtype fp16 or fp8 it must be decay"),
        ("qk_clip", "--qk-clip"),
        ("optimizer_cuda_graph", "--optimizer-cuda-graph"),
        ("experimental_attention_variant", "--experimental-attention-variant dsa"),
        ("qk_clip with latents", "--qk-clip"),
        ("norms of latents", "--longact-tap norm does not work with --multi-latent-attention"),
        ("lora on an up-projection", "LoRA on linear_kv_up_proj is not supported"),
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
