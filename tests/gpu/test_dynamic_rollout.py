"""The GPU tier: rollouts by the dynamic engine, with flash-attn's kernels and CUDA graphs, between training steps."""

import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.rl.rollouts.sampling import Sampling

_FLASH_ATTENTION = ("flash_attn", "flash_attn_3", "flashattn_hopper")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: the GPU tier needs a CUDA GPU"),
    pytest.mark.skipif(
        not any(map(find_spec, _FLASH_ATTENTION)), reason="NOT RUN: dynamic rollouts need flash-attn 2.7.3 or newer"
    ),
]

LOG_PROB_TOLERANCE = 0.1
"""bf16: the paged kernel and the training forward add in another order; a wrong context moves log-probs by about 1."""

EOD = 5
VOCAB = 500
"""The model has 512 entries, the last of them padding."""

BUFFER_BYTES = 2**30


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    from megatron.core import parallel_state, tensor_parallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29556", CUDA_DEVICE_MAX_CONNECTIONS="1")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    # CUDA graphs ask for this tracker, as Megatron's arguments give it with --cuda-graph-impl
    tensor_parallel.model_parallel_cuda_manual_seed(1234, te_rng_tracker=True, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(*, cuda_graphs: bool) -> tuple[Any, Any]:
    """A two-layer Qwen3-shaped model with Transformer Engine layers, in Megatron's DDP, and its optimizer."""
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
        gradient_accumulation_fusion=False,
        cuda_graph_impl="local" if cuda_graphs else "none",
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=512,
        max_sequence_length=768,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        model.output_layer.weight.mul_(4.0)  # far from uniform, so that a wrong context shows
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model.cuda()))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        [chunk],
    )
    return chunk, optimizer


def make_engine(model: Any, **settings: Any) -> Any:
    """`settings` go to Megatron's InferenceConfig."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig

    from megatron_longact.rl.rollouts.dynamic_engine import DynamicRolloutEngine

    graphs = {"num_cuda_graphs": 4} if model.config.cuda_graph_impl == "local" else {}
    defaults = {"buffer_size_gb": BUFFER_BYTES / 2**30, "max_sequence_length": 768, "max_requests": 16}
    return DynamicRolloutEngine(
        model,
        config=InferenceConfig(**{**defaults, "max_tokens": 4096, **graphs, **settings}),
        eod=EOD,
        vocab_size=VOCAB,
        dp_group=parallel_state.get_data_parallel_group(),
        mp_group=parallel_state.get_model_parallel_group(),
    )


def make_prompts() -> list[Any]:
    """Four samples of each of four prompts; one fills two blocks of 256 tokens, one will just outgrow its first."""
    from megatron_longact.rl.rollouts.static_engine import Prompt

    generator = torch.Generator().manual_seed(3)
    tokens = [tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in (40, 250, 530, 7)]
    return [Prompt(t, i, j) for i, t in enumerate(tokens) for j in range(4)]


def full_forward(model: Any, prompts: list[Any], rollouts: Any) -> Tensor:
    """Log-probs fp32 [n, R] of the responses by one whole forward each, without a cache; 0 where there are none."""
    log_probs = torch.zeros_like(rollouts.log_probs)
    for i, (prompt, length) in enumerate(zip(prompts, rollouts.lengths.tolist(), strict=True)):
        response = rollouts.tokens[i, :length]
        tokens = torch.cat([torch.tensor(prompt.tokens), response]).cuda()[None]
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1], device="cuda")[None], None)
        scores = logits[0, len(prompt.tokens) - 1 : -1, :VOCAB].float().log_softmax(-1).cpu()
        log_probs[i, :length] = scores.gather(-1, response[:, None]).squeeze(-1)
    return log_probs


def check(engine: Any, model: Any, sampling: Sampling) -> Any:
    """Rollouts whose log-probs are those of the model as it is now."""
    prompts = make_prompts()
    rollouts = engine.generate(prompts, sampling)
    assert rollouts.tokens.max() < VOCAB
    assert (rollouts.log_probs - full_forward(model, prompts, rollouts)).abs().max() < LOG_PROB_TOLERANCE
    assert (rollouts.log_probs < 0).sum() == rollouts.lengths.sum()
    return rollouts


def train_step(chunk: Any, optimizer: Any, longact: LongAct) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.randint(VOCAB, (2, 257), generator=torch.Generator().manual_seed(7)).cuda()

    def forward(data: Any, model: Any) -> Any:
        inputs = tokens[:, :-1].contiguous()
        longact.set_tokens(torch.ones_like(inputs, dtype=torch.bool))
        output = model(inputs, torch.arange(256, device="cuda").expand(2, -1), None, labels=tokens[:, 1:].contiguous())
        return output, lambda losses: (losses.float().mean(), {})

    chunk.train()
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=chunk,
        num_microbatches=1,
        seq_length=256,
        micro_batch_size=2,
        forward_only=False,
    )
    assert optimizer.step()[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "persist": {},
    "recompute": {"kv_cache_management_mode": "recompute"},
    "shared prefixes": {"enable_prefix_caching": True, "prefix_caching_eviction_policy": "lru"},
    "chunks": {"max_tokens": 512, "enable_chunked_prefill": True},
    "little memory": {"buffer_size_gb": 8 * 2 * 2 * 256 * 2 * 64 * 2 / 2**30},  # 8 blocks: some are evicted
}


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", SETTINGS)
def test_rollouts_are_the_models_own_before_and_after_a_step(name: str, cuda_graphs: bool) -> None:
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.transformer.cuda_graphs import (
        CudaGraphManager,
        _CudagraphGlobalRecord,
        delete_cuda_graphs,
    )
    from megatron.core.utils import unwrap_model

    chunk, optimizer = build(cuda_graphs=cuda_graphs)
    model = unwrap_model(chunk)
    sampling = Sampling(max_response_length=48, seed=1)
    with LongAct.attach([chunk], optimizer, LongActConfig()) as longact:
        engine = make_engine(model, **SETTINGS[name])
        first = check(engine, model, sampling)
        assert not InferenceMode.is_active()
        assert not any(isinstance(module, CudaGraphManager) for module in model.modules())
        train_step(chunk, optimizer, longact)
        assert longact.metrics()["longact/active_fraction_q"] == pytest.approx(0.3, abs=0.01)
        second = check(engine, model, sampling)
        check(engine, model, replace(sampling, temperature=1.0, seed=2))
    assert not torch.equal(first.log_probs, second.log_probs)
    assert bool(engine._engine.context.cuda_graph_batch_dimensions_list) == cuda_graphs
    if cuda_graphs and name != "recompute":
        assert _CudagraphGlobalRecord.cudagraph_inference_record
    delete_cuda_graphs()


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_the_same_again(cuda_graphs: bool) -> None:
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs
    from megatron.core.utils import unwrap_model

    model = unwrap_model(build(cuda_graphs=cuda_graphs)[0])
    engine = make_engine(model)
    sampling = Sampling(max_response_length=16, temperature=0.8, top_p=0.9, seed=4)
    first, again = (engine.generate(make_prompts(), sampling) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_probs, again.log_probs)
    assert not torch.equal(first.tokens, engine.generate(make_prompts(), replace(sampling, step=1)).tokens)
    delete_cuda_graphs()


@pytest.mark.parametrize("mode", ["persist", "recompute"])
def test_the_caches_memory_is_given_back(mode: str) -> None:
    from megatron.core.utils import unwrap_model

    model = unwrap_model(build(cuda_graphs=False)[0])
    before = torch.cuda.memory_allocated()
    engine = make_engine(model, kv_cache_management_mode=mode)
    engine.generate(make_prompts(), Sampling(max_response_length=4))
    held = torch.cuda.memory_allocated() - before
    assert held > 0.9 * BUFFER_BYTES if mode == "persist" else held < 0.1 * BUFFER_BYTES
