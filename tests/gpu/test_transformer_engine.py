"""The GPU tier: Transformer Engine layers and FP8 on one GPU, with the real optimizer of Megatron."""

import os
from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: the GPU tier needs a CUDA GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Any:
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    yield
    torch.distributed.destroy_process_group()


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "masters": {},
    "precision-aware": {"use_precision_aware_optimizer": True},
    "offloaded": {
        "use_precision_aware_optimizer": True,
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
        "overlap_cpu_optimizer_d2h_h2d": True,
    },
}


def build(*, fp8_recipe: str | None, optimizer: str = "masters", fused_accumulation: bool = False) -> tuple[Any, Any]:
    """A two-layer Qwen3-shaped model with Transformer Engine layers, in Megatron's DDP, and its optimizer.

    With fused accumulation weight gradients exist in `main_grad` only. The model then ends with its hidden states:
    Megatron's own output layer needs Apex for that.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        ffn_hidden_size=512,
        qk_layernorm=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=fused_accumulation,
        fp8="hybrid" if fp8_recipe else None,
        fp8_recipe=fp8_recipe or "delayed",
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=512,
        max_sequence_length=128,
        position_embedding_type="rope",
        post_process=not fused_accumulation,
    )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model.cuda()))
    megatron_optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            fp8_recipe=config.fp8_recipe if fp8_recipe else None,
            **OPTIMIZERS[optimizer],
        ),
        [chunk],
    )
    return chunk, megatron_optimizer


def step(chunk: Any, optimizer: Any, longact: LongAct, seed: int) -> None:
    """One optimizer step on two sequences of 128 tokens."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(512, (2, 129), generator=torch.Generator().manual_seed(seed)).cuda()

    def forward(data: Any, model: Any) -> Any:
        inputs = tokens[:, :-1].contiguous()
        longact.set_tokens(torch.ones_like(inputs, dtype=torch.bool))
        positions = torch.arange(128, device="cuda").expand(2, 128)
        output = model(inputs, positions, None, labels=tokens[:, 1:].contiguous())  # losses, or hidden states
        return output, lambda losses: (losses.float().mean(), {})

    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=chunk,
        num_microbatches=1,
        seq_length=128,
        micro_batch_size=2,
        forward_only=False,
    )
    assert optimizer.step()[0]


@pytest.mark.parametrize(
    "options",
    [*({"optimizer": name} for name in OPTIMIZERS), {"fused_accumulation": True}],
    ids=[*OPTIMIZERS, "fused accumulation"],
)
@pytest.mark.parametrize("fp8_recipe", [None, "delayed", "tensorwise", "blockwise"])
def test_frozen_masters_are_bit_identical(fp8_recipe: str | None, options: dict[str, Any]) -> None:
    chunk, optimizer = build(fp8_recipe=fp8_recipe, **options)
    with LongAct.attach([chunk], optimizer, LongActConfig()) as longact:
        for seed in range(3):
            shards = [shard for freeze in longact._freezes for shard in freeze.shards]
            before = [[master.detach().clone() for master in shard.masters()] for shard in shards]
            step(chunk, optimizer, longact, seed)
            for shard, olds in zip(shards, before, strict=True):
                for old, new in zip(olds, shard.masters(), strict=True):
                    pairs = zip(shard.parts(old, longact._frozen), shard.parts(new, longact._frozen), strict=True)
                    assert all(torch.equal(a[rows], b[rows]) for (a, rows), (b, _) in pairs)
                    assert not torch.equal(old, new)
        metrics = longact.metrics()
        assert metrics["longact/active_fraction_q"] == pytest.approx(0.3, abs=0.01)
        assert metrics["longact/rejected_refreshes"] == 0
