"""What LongAct refuses by name, because it would defeat the freeze or the selection silently."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from megatron_longact.config import LongActConfig
from megatron_longact.qkv_layout import QKVLayout

_REFUSED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "qk_clip": (bool, "--qk-clip", "it writes linear_qkv after the optimizer step"),
    "optimizer_cuda_graph": (bool, "--optimizer-cuda-graph", "its replay runs no step hook"),
    "cuda_graph_impl": (
        lambda impl: impl == "full_iteration",
        "--cuda-graph-impl full_iteration",
        "its replay runs no forward hook; choose none, or local with other modules than attn",
    ),
    "use_megatron_fsdp": (
        bool,
        "--use-megatron-fsdp",
        "it keeps masters and gradients outside Megatron's DDP",
    ),
    "use_torch_fsdp2": (
        bool,
        "--use-torch-fsdp2",
        "it keeps masters and gradients outside Megatron's DDP",
    ),
    "multi_latent_attention": (
        bool,
        "--multi-latent-attention",
        "its up-projections mix Q and K with V, so that no row is a Q or K channel alone",
    ),
    "overlap_moe_expert_parallel_comm": (
        bool,
        "--overlap-moe-expert-parallel-comm",
        "it runs layers outside the model's forward, where LongAct cannot tell training from rollouts",
    ),
}


def check_settings(*sources: Any) -> None:
    """Raise `ValueError` if Megatron's arguments or configs switch on what LongAct refuses.

    sources: any of the argument namespace, `TransformerConfig`, `OptimizerConfig` and
    `DistributedDataParallelConfig`, which name their fields alike.
    """
    for name, (refused, flag, reason) in _REFUSED.items():
        for source in sources:
            if refused(getattr(source, name, False)):
                raise ValueError(f"LongAct does not work with {flag}: {reason}")


def check_tap(config: LongActConfig, source: Any) -> None:
    """Raise `ValueError` if the tap is not there; source: argument namespace or `TransformerConfig`."""
    if config.tap != "norm" or not config.reads_activations:
        return
    if getattr(source, "fused_single_qkv_rope", False):
        raise ValueError("--longact-tap norm does not work with --fused-single-qkv-rope: Q and K are not split there")
    if not (getattr(source, "qk_layernorm", False) or getattr(source, "qk_l2_norm", False)):
        raise ValueError("--longact-tap norm needs --qk-layernorm; without it use --longact-tap projection")


def check_linear_qkv(name: str, module: nn.Module, layout: QKVLayout, tp_size: int) -> None:
    """Raise `ValueError` if `linear_qkv` is not Megatron's plain fused projection (LoRA wraps it)."""
    weight = getattr(module, "weight", None)
    rows = layout.rows_per_partition(tp_size)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.shape[0] != rows:
        found = (
            f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, nn.Parameter) else "no weight of its own"
        )
        raise ValueError(
            f"{name} is a {type(module).__name__} with {found}; LongAct needs the plain fused projection with "
            f"{rows} rows on this rank (LoRA on linear_qkv is not supported)"
        )


def check_chunks(model_chunks: Iterable[nn.Module]) -> None:
    """Raise `ValueError` unless Megatron's DistributedDataParallel holds the gradients of each chunk."""
    for chunk in model_chunks:
        if not hasattr(chunk, "zero_grad_buffer"):
            raise ValueError(
                f"LongAct.attach was given a {type(chunk).__name__}; give it the model chunks that are wrapped in "
                "megatron.core.distributed.DistributedDataParallel"
            )
