"""A small Qwen3-shaped model with Transformer Engine layers, Megatron's optimizer around it, and one step of both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct

GPU_TIER = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: the GPU tier needs a CUDA GPU"),
    pytest.mark.usefixtures("one_rank"),
]

SEQUENCE, BATCH, VOCAB = 128, 2, 512


@dataclass(frozen=True)
class GPUSpec:
    """What a test wants; `transformer`, `optimizer` and `ddp` go to Megatron's configs as they are."""

    fp8_recipe: str | None = None
    fp8_param: bool = False
    hidden_states_out: bool = False
    """End with the hidden states: with fused accumulation Megatron's own output layer needs Apex."""
    max_length: int = SEQUENCE
    transformer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass
class GPUModel:
    """The model in Megatron's DDP, and its optimizer."""

    chunk: Any
    optimizer: Any
    config: Any

    @property
    def layers(self) -> Any:
        return self.chunk.module.module.decoder.layers

    @property
    def qkv_weights(self) -> list[Any]:
        return [layer.self_attention.linear_qkv.weight for layer in self.layers]


def build(spec: GPUSpec, *, change_config: Callable[[Any], None] = lambda config: None) -> GPUModel:
    """Two layers, 256 hidden, 4 heads of 64 channels in 2 groups; skips where the chip lacks the recipe.

    change_config: is given the TransformerConfig after Megatron checked it and before a model is made of it.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    skip_without_chip(spec.fp8_recipe)
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 512,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "gradient_accumulation_fusion": False,
        "fp8": "hybrid" if spec.fp8_recipe else None,
        "fp8_recipe": spec.fp8_recipe or "delayed",
        "fp8_param": spec.fp8_param,
    }
    config = TransformerConfig(**{**settings, **spec.transformer})
    config.finalize_model_grads_func = finalize_model_grads
    change_config(config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=VOCAB,
        max_sequence_length=spec.max_length,
        position_embedding_type="rope",
        post_process=not spec.hidden_states_out,
    )
    ddp = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, "fp8_param_gather": spec.fp8_param}
    stream = (
        torch.cuda.Stream()
    )  # as Megatron does: a backward is captured only where its hooks are not of the default one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chunk = DistributedDataParallel(
            config, DistributedDataParallelConfig(**{**ddp, **spec.ddp}), Float16Module(config, model.cuda())
        )
    torch.cuda.current_stream().wait_stream(stream)
    optimizer = {
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.1,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_distributed_optimizer": True,
        "fp8_recipe": spec.fp8_recipe,
    }
    return GPUModel(chunk, get_megatron_optimizer(OptimizerConfig(**{**optimizer, **spec.optimizer}), [chunk]), config)


def copy_weights(source: GPUModel, target: GPUModel) -> None:
    """Give a model, and its masters, the bf16 weights of another one."""
    weights = dict(source.chunk.named_parameters())
    with torch.no_grad():
        for name, parameter in target.chunk.named_parameters():
            parameter.copy_(weights[name])
    target.optimizer.reload_model_params()


def skip_without_chip(fp8_recipe: str | None) -> None:
    """Skip, and say why, if this GPU has no tensor cores for the recipe."""
    import transformer_engine.pytorch as te

    checks = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    if fp8_recipe is not None:
        available, reason = checks.get(fp8_recipe, te.is_fp8_available)(return_reason=True)
        if not available:
            pytest.skip(f"NOT RUN: this GPU has no {fp8_recipe} FP8: {reason}")


def random_tokens(seed: int, *, length: int = SEQUENCE) -> Tensor:
    """int64 [BATCH, length + 1]."""
    return torch.randint(VOCAB, (BATCH, length + 1), generator=torch.Generator().manual_seed(seed)).cuda()


def train_step(model: GPUModel, longact: LongAct | None, seed: int, *, length: int = SEQUENCE) -> None:
    """One optimizer step on two sequences; it must not be skipped."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = random_tokens(seed, length=length)

    def forward(data: Any, chunk: Any) -> Any:
        inputs = tokens[:, :-1].contiguous()
        if longact is not None:
            longact.set_tokens(torch.ones_like(inputs, dtype=torch.bool))
        positions = torch.arange(length, device="cuda").expand(BATCH, length)
        output = chunk(inputs, positions, None, labels=tokens[:, 1:].contiguous())  # losses, or hidden states
        return output, lambda losses: (losses.float().mean(), {})

    model.chunk.train()
    model.chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=model.chunk,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    assert model.optimizer.step()[0]


def fp8_image(weight: Any) -> tuple[Tensor, Tensor]:
    """The bytes [rows, h] of a weight that is kept in FP8, and its scale or scales; copies."""
    names = ("_data", "_scale_inv") if hasattr(weight, "_data") else ("_rowwise_data", "_rowwise_scale_inv")
    data, scale = (getattr(weight, name).detach().clone() for name in names)
    return data.view(weight.shape), scale
