"""What LongAct refuses by name, because it would defeat the freeze or the selection silently."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_longact.attention_layout import Projection
from megatron_longact.config import LongActConfig
from megatron_longact.versions import warn_if_untested

Setting = Callable[[str], Any]
"""The value of a setting, None if no source switches it on."""


def _cuda_graphs(setting: Setting) -> tuple[str, set[str]]:
    """How training is captured, and the modules (none: whole layers), whichever of Megatron's names says so.

    Source: megatron/training/arguments.py, `validate_args`, and `TransformerConfig.__post_init__`.
    """
    impl = setting("cuda_graph_impl") or "none"
    if setting("enable_cuda_graph"):
        impl = "local"
    if setting("external_cuda_graph"):
        impl = "transformer_engine"
    given = setting("cuda_graph_modules") or setting("cuda_graph_scope_deprecated") or setting("cuda_graph_scope") or []
    listed = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    modules = {getattr(module, "name", module) for module in listed}
    if "full_iteration" in modules:
        impl = "full_iteration"
    return impl, modules - {"", "full", "full_iteration", "full_iteration_inference"}


def _graphs_of_attention(setting: Setting) -> bool:
    impl, modules = _cuda_graphs(setting)
    return impl == "transformer_engine" and (not modules or "attn" in modules)


def _optimizer_writes_fp8(setting: Setting) -> bool:
    fp8_weights = setting("fp8_param_gather") or setting("fp8_param")
    precision_aware = setting("use_precision_aware_optimizer")
    return bool(fp8_weights and precision_aware and setting("fp8_recipe") == "delayed")


_ELEMENTWISE = ("adam", "sgd", "lion")  # what they do to an element depends on nothing but that element


def _mixes_rows(setting: Setting) -> bool:
    return setting("optimizer") not in (None, *_ELEMENTWISE)


def _offloads_views_of_weights(setting: Setting) -> bool:
    """Source: megatron/core/optimizer/distrib_optimizer.py, `_build_model_and_main_param_groups`."""
    steps_views = setting("use_precision_aware_optimizer") or not (setting("bf16") or setting("fp16"))
    return bool(setting("rl_offload_optimizer_during_inference") and steps_views)


def _shards_rows_further(setting: Setting) -> bool:
    """Source: megatron/core/model_parallel_config.py, `tensor_parallel_num_weight_shards`."""
    shards = setting("tensor_parallel_num_weight_shards") or 1
    return shards > (setting("tensor_model_parallel_size") or 1) or (setting("gtp_weight_remat_size") or 1) > 1


_REFUSED: tuple[tuple[Callable[[Setting], Any], str | Callable[[Setting], str], str], ...] = (
    (lambda s: s("qk_clip"), "--qk-clip", "it writes linear_qkv after the optimizer step"),
    (lambda s: s("optimizer_cuda_graph"), "--optimizer-cuda-graph", "its replay runs no step hook"),
    (
        lambda s: _cuda_graphs(s)[0] == "full_iteration",
        "--cuda-graph-impl full_iteration",
        "its replay runs no forward hook and no finalize_model_grads_func; choose none, or transformer_engine with "
        "--cuda-graph-modules that leave attention out",
    ),
    (
        _graphs_of_attention,
        "--cuda-graph-impl transformer_engine over attention",
        "a replayed layer runs no forward hook, so that nothing would be captured; choose none, or "
        "--cuda-graph-modules without attn",
    ),
    (
        lambda s: s("rl_training_cuda_graphs"),
        "--rl-training-cuda-graphs",
        "a replayed forward runs no hook; --cuda-graph-impl local alone uses graphs for rollouts only",
    ),
    (
        _optimizer_writes_fp8,
        "--use-precision-aware-optimizer with --fp8-param-gather and --fp8-recipe delayed",
        "its optimizer writes the FP8 weights before the frozen rows are put back; choose --fp8-recipe tensorwise or "
        "blockwise, or leave one of the others out",
    ),
    (
        _mixes_rows,
        lambda s: f"--optimizer {s('optimizer')}",
        "it orthogonalises or preconditions whole matrices, so that what is remembered of frozen rows moves the active "
        "ones; choose adam or sgd",
    ),
    (
        lambda s: s("use_layer_wise_distributed_optimizer"),
        "Megatron's layer-wise distributed optimizer (--use-distributed-optimizer with --optimizer lion)",
        "a rank steps whole layers there, which LongAct has no resolver for; choose adam, or leave "
        "--use-distributed-optimizer out",
    ),
    (
        _offloads_views_of_weights,
        "--rl-offload-optimizer-during-inference with --use-precision-aware-optimizer or fp32 weights",
        "what the optimizer steps are the weights themselves then, and Megatron puts copies in their place, so that no "
        "step reaches the model any more; leave one of them out",
    ),
    (
        lambda s: s("use_megatron_fsdp"),
        "--use-megatron-fsdp",
        "it keeps masters and gradients outside Megatron's DDP",
    ),
    (
        lambda s: s("use_torch_fsdp2"),
        "--use-torch-fsdp2",
        "it keeps masters and gradients outside Megatron's DDP",
    ),
    (
        _shards_rows_further,
        "--tensor-parallel-num-weight-shards beyond the tensor parallel size",
        "a rank's weight is then a part of its tensor-parallel rows, which LongAct has no map for",
    ),
    (
        lambda s: s("experimental_attention_variant") == "dsa",
        "--experimental-attention-variant dsa",
        "it multiplies K's up-projection into Q, so that K's channels are never computed",
    ),
    (
        lambda s: s("hybrid_context_parallel"),
        "--hybrid-context-parallel",
        "it cuts each sequence over another number of ranks, so that the tokens of a rank are not known",
    ),
    (
        lambda s: s("overlap_moe_expert_parallel_comm"),
        "--overlap-moe-expert-parallel-comm",
        "it runs layers outside the model's forward, where LongAct cannot tell training from rollouts",
    ),
)


def check_settings(*sources: Any) -> None:
    """Raise `ValueError` if Megatron's arguments or configs switch on what LongAct refuses.

    sources: any of the argument namespace, before or after Megatron validated it, `TransformerConfig`,
    `OptimizerConfig` and `DistributedDataParallelConfig`, which name their fields alike.
    """

    def setting(name: str) -> Any:
        return next((value for source in sources if (value := getattr(source, name, None))), None)

    for refused, flag, reason in _REFUSED:
        if refused(setting):
            named = flag if isinstance(flag, str) else flag(setting)
            raise ValueError(f"LongAct does not work with {named}: {reason}")


def check_layers_are_eager(layers: Sequence[TransformerLayer]) -> None:
    """Raise `ValueError` if a layer is about to be captured in a CUDA graph of Megatron's own, or replayed from it.

    Any module that `--cuda-graph-modules` names makes that of a whole dense layer. An engine may put graphs on
    for rollouts, as long as they are off when the model trains.
    """
    for layer in layers:
        if hasattr(layer, "cudagraph_manager") and not getattr(layer, "use_partial_cudagraphs", False):
            raise ValueError(
                "LongAct does not work with --cuda-graph-impl local in training: a replayed layer runs no forward "
                "hook, so that nothing would be captured; use it for rollouts alone (--inference-dynamic-batching, or "
                "train_rl.py without --rl-training-cuda-graphs), or choose none"
            )


def check_tap(config: LongActConfig, source: Any) -> None:
    """Raise `ValueError` if the tap is not there; source: argument namespace or `TransformerConfig`."""
    if config.tap != "norm" or not config.reads_activations:
        return
    if getattr(source, "multi_latent_attention", False):
        raise ValueError(
            "--longact-tap norm does not work with --multi-latent-attention: its norms are those of the latents; use "
            "--longact-tap projection"
        )
    if getattr(source, "fused_single_qkv_rope", False):
        raise ValueError("--longact-tap norm does not work with --fused-single-qkv-rope: Q and K are not split there")
    if not (getattr(source, "qk_layernorm", False) or getattr(source, "qk_l2_norm", False)):
        raise ValueError("--longact-tap norm needs --qk-layernorm; without it use --longact-tap projection")


def check_projection(name: str, module: nn.Module, projection: Projection, tp_size: int) -> bool:
    """Whether every tensor-parallel rank holds all of it.

    Raises `ValueError` if it is not Megatron's plain projection (LoRA wraps it).
    """
    weight = getattr(module, "weight", None)
    rows, every = len(projection.shard(0, tp_size)), len(projection.channels)
    found = weight.shape[0] if isinstance(weight, nn.Parameter) and weight.dim() == 2 else 0
    if found == rows or (projection.replicable and found == every):
        return found != rows
    described = (
        f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, nn.Parameter) else "no weight of its own"
    )
    raise ValueError(
        f"{name} is a {type(module).__name__} with {described}; LongAct needs the plain projection with "
        f"{rows} rows on this rank (LoRA on {projection.name} is not supported)"
    )


def check_chunks(model_chunks: Iterable[nn.Module]) -> None:
    """Raise `ValueError` unless Megatron's DistributedDataParallel holds the chunks' gradients; and for an old one."""
    warn_if_untested()
    for chunk in model_chunks:
        if not hasattr(chunk, "zero_grad_buffer"):
            raise ValueError(
                f"LongAct.attach was given a {type(chunk).__name__}; give it the model chunks that are wrapped in "
                "megatron.core.distributed.DistributedDataParallel"
            )
