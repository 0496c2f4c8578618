"""Tiny GPT models of real megatron-core, with weights that do not depend on the layout.

Fresh Megatron initialisations differ by tensor-parallel size, so each parameter is drawn in full from a seed of
its name, and every rank takes its shard.
"""

import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from tests.pickling import dumps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """What a test wants of a model; `config` goes to TransformerConfig as it is."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    kv_channels: int = 8
    vocab: int = 64
    max_length: int = 64
    qk_layernorm: bool = True
    dtype: str = "fp32"
    config: dict[str, Any] = field(default_factory=dict)
    yarn: bool = False
    mla: dict[str, Any] | None = None
    """Multi-latent attention: what goes to MLATransformerConfig; heads have its sizes, not `kv_channels`."""
    whole_down_projections: bool = False
    """Every tensor-parallel rank holds all of them, as with Transformer Engine."""
    transformer_engine: bool = False
    """Its layers; only where it is installed."""
    blocks: str = ""
    """A heterogeneous model: what each layer is, in JSON."""
    pattern: str = ""
    """A hybrid model: `*` attention, `-` MLP, `|` where a pipeline stage ends."""


_YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 2.0,
    "yarn_beta_slow": 0.1,
    "yarn_mscale": 1.5,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
"""What Megatron's YaRN reads; no fields of its config, but set on it by `core_transformer_config_from_args`."""


@dataclass(frozen=True)
class OptimizerSpec:
    """What a test wants of the optimizer; `config` goes to OptimizerConfig, `ddp` to the DDP config."""

    distributed: bool = False
    overlap: bool = False
    lr: float = 1e-2
    weight_decay: float = 0.1
    clip: float = 1.0
    eps: float = 1e-4  # Adam's usual 1e-8 turns rounding of a nearly zero gradient into a whole step
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass
class Built:
    """The chunks of this rank, wrapped in Megatron's DDP, and their optimizer."""

    chunks: list[Any]
    optimizer: Any
    config: TransformerConfig
    spec: ModelSpec


def transformer_config(spec: ModelSpec) -> TransformerConfig:
    """The TransformerConfig of a spec, for the parallel state as it is."""
    dtype = DTYPES[spec.dtype]
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    settings: dict[str, Any] = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_query_groups": spec.groups,
        "kv_channels": spec.kv_channels,
        "ffn_hidden_size": 2 * spec.hidden,
        "qk_layernorm": spec.qk_layernorm,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": spec.dtype == "bf16",
        "fp16": spec.dtype == "fp16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        # with two stages both neighbours are one rank: only this order tells their messages apart over gloo
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deterministic_mode": True,
    }
    if spec.mla is not None:
        settings |= {"num_query_groups": spec.heads, "rope_type": "rope", **spec.mla}
        return MLATransformerConfig(**{**settings, **spec.config})
    if spec.blocks:
        settings |= {"heterogeneous_layers_config_encoded_json": spec.blocks}
        return HeterogeneousTransformerConfig(**{**settings, **spec.config})
    config = TransformerConfig(**{**settings, **spec.config})
    for name, value in _YARN.items() if spec.yarn else ():
        setattr(config, name, value)
    return config


def build(spec: ModelSpec, optimizer: OptimizerSpec | None = None) -> Built:
    """Model chunks of this rank, in DDP, with Megatron's optimizer and finalize function."""
    optimizer = optimizer or OptimizerSpec()
    config = transformer_config(spec)
    config.finalize_model_grads_func = finalize_model_grads
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = [
        _wrapped(_gpt(spec, config, stage if vpp else None), spec, config, optimizer) for stage in range(vpp or 1)
    ]
    optimizer_config = OptimizerConfig(
        **{
            "optimizer": "adam",
            "lr": optimizer.lr,
            "weight_decay": optimizer.weight_decay,
            "clip_grad": optimizer.clip,
            "adam_eps": optimizer.eps,
            "bf16": spec.dtype == "bf16",
            "fp16": spec.dtype == "fp16",
            "params_dtype": DTYPES[spec.dtype],
            "use_distributed_optimizer": optimizer.distributed,
            "overlap_param_gather": optimizer.overlap and optimizer.distributed,
            **optimizer.config,
        }
    )
    megatron_optimizer = get_megatron_optimizer(optimizer_config, chunks)
    for group in megatron_optimizer.param_groups:
        group["lr"] = optimizer.lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = optimizer.weight_decay * group.get("wd_mult", 1.0)
    if optimizer.overlap:
        config.no_sync_func = [c.no_sync for c in chunks] if vpp else chunks[0].no_sync
    config.grad_scale_func = megatron_optimizer.scale_loss
    return Built(chunks, megatron_optimizer, config, spec)


def _layer_spec(spec: ModelSpec, config: TransformerConfig) -> Any:
    if spec.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=spec.qk_layernorm,
            multi_latent_attention=spec.mla is not None,
            **({"mla_down_proj_fusion": True} if spec.mla and spec.mla.get("mla_down_proj_fusion") else {}),
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=spec.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=spec.mla is not None,
    )
    if spec.whole_down_projections:
        from megatron.core.post_training.modelopt.layers import Linear

        multi_latent_attention.Linear = Linear  # Megatron's own; it takes it from there where TE is
        attention = layer.submodules.self_attention.submodules
        attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    return layer


def _hybrid_stack() -> ModuleSpec:
    """Attention layers without an MLP, and MLPs as layers, of Megatron's local modules."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    local = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm").submodules
    names = {"attention_layer": ("input_layernorm", "self_attention", "self_attn_bda")}
    names["mlp_layer"] = ("pre_mlp_layernorm", "mlp", "mlp_bda")
    layers = {
        name: ModuleSpec(
            module=TransformerLayer if name == "attention_layer" else MLPLayer,
            submodules=TransformerLayerSubmodules(**{part: getattr(local, part) for part in parts}),
        )
        for name, parts in names.items()
    }
    return ModuleSpec(module=HybridStack, params={"post_layer_norm": False}, submodules=HybridStackSubmodules(**layers))


def _gpt(spec: ModelSpec, config: TransformerConfig, vp_stage: int | None) -> nn.Module:
    settings: dict[str, Any] = {
        "config": config,
        "vocab_size": spec.vocab,
        "max_sequence_length": spec.max_length,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "yarn" if spec.yarn else "rope",
        "vp_stage": vp_stage,
    }
    if spec.pattern:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        pattern = spec.pattern if config.pipeline_model_parallel_size > 1 else spec.pattern.replace("|", "")
        model = HybridModel(hybrid_stack_spec=_hybrid_stack(), hybrid_layer_pattern=pattern, **settings)
    else:
        layers = get_gpt_heterogeneous_layer_spec(config) if spec.blocks else _layer_spec(spec, config)
        model = GPTModel(transformer_layer_spec=layers, **settings)
    with torch.no_grad():
        for name, parameter, shard in _named_shards(model):
            parameter.copy_(shard.local(full_value(name, shard.full_shape(parameter.shape))))
    return model


def _wrapped(model: nn.Module, spec: ModelSpec, config: TransformerConfig, optimizer: OptimizerSpec) -> Any:
    ddp = {
        "use_distributed_optimizer": optimizer.distributed,
        "overlap_grad_reduce": optimizer.overlap,
        "overlap_param_gather": optimizer.overlap and optimizer.distributed,
        "grad_reduce_in_fp32": True,
        "bucket_size": 4000 if optimizer.overlap else None,
        **optimizer.ddp,
    }
    module = model if spec.dtype == "fp32" else Float16Module(config, model)
    return DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), module)


@dataclass(frozen=True)
class _Shard:
    """How one parameter of this rank lies in the whole one."""

    dim: int | None
    rank: int
    size: int

    def full_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return tuple(n * self.size if i == self.dim else n for i, n in enumerate(shape))

    def local(self, full: Tensor) -> Tensor:
        return full if self.dim is None else full.chunk(self.size, self.dim)[self.rank]


def _named_shards(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, _Shard]]:
    """Parameters under the names they have in the whole model: global layer and expert numbers."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("module.").removeprefix("module.").split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            prefix = name[: name.index(".layers.")] + f".layers.{parts[at]}"
            parts[at] = str(model.get_submodule(prefix).layer_number - 1)
        if "local_experts" in parts:
            at, local = parts.index("local_experts") + 1, model.config.num_moe_experts
            local //= parallel_state.get_expert_model_parallel_world_size()
            parts[at] = str(int(parts[at]) + local * parallel_state.get_expert_model_parallel_rank())
        sharded = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
        dim = parameter.partition_dim if sharded else None
        yield ".".join(parts), parameter, _Shard(dim, tp_rank, tp_size if sharded else 1)


def full_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a parameter of the whole model begins with."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:  # norms begin at one, biases at zero; neither exactly, so that a mistake shows
        centre = 0.0 if name.endswith("bias") else 1.0
        return centre + 0.1 * torch.randn(shape, generator=generator)
    value = torch.randn(shape, generator=generator) * shape[1] ** -0.5
    # a few loud output channels, as LongAct expects them, and no two alike
    return value * (1 + 2 * torch.rand(shape[0], 1, generator=generator) ** 4)


def random_tokens(num_sequences: int, length: int, *, vocab: int = 64, seed: int = 0) -> Tensor:
    """Token ids: int64 [num_sequences, length + 1]."""
    return torch.randint(vocab, (num_sequences, length + 1), generator=torch.Generator().manual_seed(seed))


def train_step(
    built: Built,
    tokens: Tensor,
    *,
    micro_batch_size: int = 1,
    before_forward: Callable[[Tensor], None] | None = None,
    forward_kwargs: Callable[[Tensor], dict[str, Any]] | None = None,
    step: bool = True,
) -> tuple[bool, float | None]:
    """One step on a global batch [n, s + 1]; data-parallel ranks take every dp-th micro-batch.

    `before_forward` sees the inputs [b, s] of a micro-batch just before the model does, as a program's
    forward step would. Returns whether the optimizer stepped, and the gradient norm.
    """
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    micro_batches = list(tokens.split(micro_batch_size))[dp_rank::dp_size]
    iterators = [iter(micro_batches) for _ in built.chunks]

    def forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(data)
        inputs, labels = batch[:, :-1], batch[:, 1:]
        if before_forward is not None:
            before_forward(inputs)
        b, s = inputs.shape
        mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
        extra = forward_kwargs(inputs) if forward_kwargs else {}
        output = model(inputs, torch.arange(s).expand(b, s), mask, labels=labels, **extra)
        return output, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=built.chunks if len(built.chunks) > 1 else built.chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    if not step:
        return False, None
    success, grad_norm, _ = built.optimizer.step()
    return success, grad_norm


def full_weights(built: Built, *, masters: bool = False) -> dict[str, Tensor]:
    """Every parameter of the whole model, gathered over the world; replicas must be bit-equal.

    masters: fp32 master values where this rank owns all of a parameter (no distributed optimizer).
    """
    local = []
    for chunk in built.chunks:
        if built.spec.dtype != "never":
            with suppress(AttributeError, AssertionError):
                chunk.start_param_sync(force_sync=True)
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        for name, parameter, shard in _named_shards(model):
            value = getattr(parameter, "main_param", parameter) if masters else parameter
            local.append((name, shard, value.detach().view(parameter.shape).clone()))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, dumps(local))
    parts: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int | None] = {}
    for name, shard, value in (entry for rank in everywhere for entry in pickle.loads(rank)):
        known = parts.setdefault(name, {}).setdefault(shard.rank if shard.dim is not None else 0, value)
        assert torch.equal(known, value), f"replicas of {name} differ"
        dims[name] = shard.dim
    return {
        name: found[0] if dims[name] is None else torch.cat([found[r] for r in sorted(found)], dims[name])
        for name, found in sorted(parts.items())
    }


__all__ = [
    "Built",
    "ModelSpec",
    "OptimizerSpec",
    "build",
    "full_value",
    "full_weights",
    "random_tokens",
    "train_step",
    "transformer_config",
]
