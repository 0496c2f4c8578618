"""Transformer Engine's real modules, built on the CPU: names, checkpoint keys, what is read of them, refusals.

Megatron's Transformer Engine layer spec, in ranks whose CPU mode leaves Transformer Engine to be found; where a module
runs, torch stands in for its kernels (`tests.te.torch_kernels`). Checkpoints of the converter are loaded by Megatron
itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion import to_megatron
from megatron_longact.reduction import STATISTICS
from tests import ranks
from tests.conversion import SMALL, build_from_args, hf_logits, make_hf, megatron_logits
from tests.gpu.models import GPUSpec, build, train_step
from tests.launch import ROOT
from tests.ranks import Layout

TE_LAYERS = ["--transformer-impl=transformer_engine"]
STRICT = ["--dist-ckpt-strictness", "raise_unexpected"]  # everything that the model asks for is in the checkpoint
LENIENT = ["--dist-ckpt-strictness", "log_all"]
TOKENS = torch.randint(SMALL["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))

# -- attached ------------------------------------------------------------------------------------------


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def attached_and_detached() -> dict[str, Any]:
    model = build(GPUSpec())
    inner = model.optimizer.chained_optimizers[0].optimizer
    before = hooks_of(model.chunk), model.config.finalize_model_grads_func
    with LongAct.attach([model.chunk], model.optimizer, LongActConfig()) as longact:
        frozen = {id(parameter) for parameter in longact.model.frozen_rows(longact.model.channels(False))}
        hooked = hooks_of(model.chunk), len(inner._optimizer_step_pre_hooks), len(inner._optimizer_step_post_hooks)
    return {
        "module": type(model.layers[0].self_attention.linear_qkv).__name__,
        "inner": f"{type(inner).__module__}.{type(inner).__name__}",
        "names": [name for name, parameter in model.chunk.named_parameters() if id(parameter) in frozen],
        "all": [name for name, _ in model.layers[0].named_parameters()],
        "hooked": hooked,
        "left": (hooks_of(model.chunk), model.config.finalize_model_grads_func) == before
        and not inner._optimizer_step_pre_hooks
        and not inner._optimizer_step_post_hooks,
    }


def test_attach_finds_the_fused_layers_by_their_names_and_leaves_nothing() -> None:
    [seen] = ranks.run(attached_and_detached)
    assert seen["module"] == "TELayerNormColumnParallelLinear"
    assert seen["inner"] == "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"
    assert seen["all"] == [
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    assert [name.split("layers.")[1] for name in seen["names"]] == [
        f"{layer}.self_attention.linear_qkv.weight" for layer in (0, 1)
    ]
    assert seen["hooked"][1:] == (1, 1)
    assert seen["left"]


# -- what is read --------------------------------------------------------------------------------------


def read_and_recomputed() -> dict[str, Any]:
    """Sums of |Q| and |K| of the first layer, by the hook, and from its input, norm and weight."""
    model = build(GPUSpec(optimizer={"lr": 0.0, "weight_decay": 0.0}))
    layer = model.layers[0].self_attention.linear_qkv
    seen: list[tuple[Tensor, Any]] = []
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output)))
    with LongAct.attach([model.chunk], model.optimizer, LongActConfig()) as longact:
        train_step(model, longact, seed=1)
        saliency = longact.saliency[1]
    [(hidden, output)] = seen
    with torch.no_grad():
        gamma, hidden = layer.layer_norm_weight.float(), hidden.float()
        normal = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], gamma, layer.eps)
        wanted = normal.flatten(0, 1) @ layer.weight.float().T
    return {
        "output": (type(output), output[0].dtype, output[1]),
        "wanted": STATISTICS["mean-abs"].reduce(wanted, None) / len(wanted),
        **saliency,
    }


def test_the_hook_of_a_fused_layer_reads_what_comes_out_of_it() -> None:
    [seen] = ranks.run(read_and_recomputed)
    assert seen["output"] == (tuple, torch.bfloat16, None)
    groups = seen["wanted"].view(2, 4 * 64)  # [Q, Q, K, V] of each query group
    torch.testing.assert_close(seen["q"], groups[:, :128].flatten(), rtol=5e-3, atol=1e-4)  # a bf16 sum against fp32
    torch.testing.assert_close(seen["k"], groups[:, 128:192].flatten(), rtol=5e-3, atol=1e-4)


def kept_weights() -> list[bool]:
    from megatron_longact.generation.engine import generation_mode

    model = build(GPUSpec())
    model.config.fp8 = "hybrid"
    modules = [model.layers[0].self_attention.linear_qkv, model.layers[0].mlp.linear_fc1]
    for module in modules:
        module._fp8_workspaces["weight"] = torch.zeros(1)
    with generation_mode(model.chunk):
        return [bool(module._fp8_workspaces) for module in modules]


def test_generation_forgets_the_weights_that_these_modules_keep_in_fp8() -> None:
    assert ranks.run(kept_weights) == [[False, False]]


def taps() -> set[int]:
    model = build(GPUSpec())
    with LongAct.attach([model.chunk], model.optimizer, LongActConfig(tap="norm")) as longact:
        train_step(model, longact, seed=1)
        return {int(mask["q"].sum()) for mask in longact.masks.values()}


def test_q_and_k_norms_can_be_read_instead() -> None:
    assert ranks.run(taps) == [{77}]  # 30 % of 256


# -- checkpoints ---------------------------------------------------------------------------------------

FAMILIES = {"qwen2": [], "qwen3": [], "qwen3-moe": [], "qwen3-moe grouped": ["--moe-grouped-gemm"]}
LOCAL_ONLY = {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}
"""Where Megatron's local layers look for the norm before experts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def converted(folder: Path, family: str) -> Path:
    path = folder / family.split()[0]
    if not path.exists():
        make_hf(path.name, path / "hf")
        to_megatron.convert(path / "hf", path / "megatron")
    return path


def keys_of(load: Path, flags: list[str]) -> tuple[set[str], set[str]]:
    """What the model's `sharded_state_dict` names, tensors by key and objects with their place; and the checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.training.global_vars import unset_global_variables
    from torch.distributed.checkpoint import FileSystemReader

    try:
        state = build_from_args(load, flags).sharded_state_dict()
    finally:
        unset_global_variables()
    apply_factories(state)
    asked = {v.unique_key if isinstance(v, ShardedObject) else v.key for v in nested_values(state)}
    [iteration] = load.glob("*/.metadata")
    return asked, set(FileSystemReader(iteration.parent).read_metadata().state_dict_metadata)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converter_writes_the_keys_that_the_modules_ask_for(folder: Path, family: str) -> None:
    path = converted(folder, family)
    [(asked, written)] = ranks.run(keys_of, load=path / "megatron", flags=[*TE_LAYERS, *FAMILIES[family]])
    assert any(key.endswith("linear_qkv._extra_state/shard_0_2") for key in asked)
    assert asked <= written
    unasked = {key for key in written - asked if "_extra_state" not in key}
    assert unasked == {"common_state/shard_0_1"} | (LOCAL_ONLY if "moe" in family else set())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3-moe"])
def test_a_converted_model_is_the_same_function_in_these_modules(folder: Path, family: str, tp: int) -> None:
    path = converted(folder, family)
    flags = [*STRICT, *TE_LAYERS]
    run = {"load": path / "megatron", "tokens": TOKENS, "sizes": Layout(tp=tp), "flags": flags}
    got = ranks.run(megatron_logits, world_size=tp, layout=Layout(tp=tp), **run)[-1]
    wanted = hf_logits(path / "hf", TOKENS)
    assert got[..., : wanted.shape[-1]].allclose(wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_checkpoint_of_local_layers_is_the_same_function_in_these_modules() -> None:
    """The demo's, made on a CPU, lacks the `_extra_state` that these modules ask for, and nothing else."""
    run = {"load": ROOT / "examples/demo/start_checkpoint", "tokens": torch.randint(64, (2, 48)), "sizes": Layout()}
    layers = ["--transformer-impl=local"], TE_LAYERS
    wanted, got = (ranks.run(megatron_logits, **run, flags=[*LENIENT, *flags])[0] for flags in layers)
    assert got.allclose(wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


# -- refusals ------------------------------------------------------------------------------------------

PRECISION_AWARE = {"use_precision_aware_optimizer": True}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "held moments": ({}, {"moments": "hold"}, None),
    "held moments, precision-aware": (PRECISION_AWARE, {"moments": "hold"}, "must be decay"),
    "reset moments, precision-aware": (PRECISION_AWARE, {"moments": "reset"}, "must be decay"),
    "held moments in fp16": ({**PRECISION_AWARE, "exp_avg_dtype": torch.float16}, {"moments": "hold"}, "must be decay"),
    "masters in fp16": ({**PRECISION_AWARE, "main_params_dtype": torch.float16}, {}, "--main-params-dtype fp32"),
}


def refusals() -> dict[str, str | None]:
    said: dict[str, str | None] = {}
    for case, (optimizer, settings, _) in REFUSED.items():
        model = build(GPUSpec(optimizer=optimizer))
        before = hooks_of(model.chunk)
        try:
            LongAct.attach([model.chunk], model.optimizer, LongActConfig(**settings)).detach()
            said[case] = None
        except ValueError as error:
            said[case] = str(error)
        assert hooks_of(model.chunk) == before
    return said


def test_settings_of_fused_adam_that_a_freeze_cannot_do_are_refused() -> None:
    [said] = ranks.run(refusals)
    for case, (_, _, wanted) in REFUSED.items():
        assert (said[case] is None) == (wanted is None), (case, said[case])
        assert wanted is None or wanted in said[case], case
