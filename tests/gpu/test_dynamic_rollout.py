"""The GPU tier: rollouts by the dynamic engine, with flash-attn's kernels and CUDA graphs, between training steps."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.generation.sampling import Sampling
from tests.gpu.models import GPU_TIER, GPUModel, GPUSpec, train_step
from tests.gpu.models import build as build_model

_FLASH_ATTENTION = ("flash_attn", "flash_attn_3", "flashattn_hopper")

pytestmark = [
    *GPU_TIER,
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


def build(*, cuda_graphs: bool) -> GPUModel:
    """A model that learns fast, so that a step shows in its log-probs."""
    built = build_model(
        GPUSpec(
            max_length=768,
            transformer={"cuda_graph_impl": "local" if cuda_graphs else "none"},
            optimizer={"lr": 1e-2},
        )
    )
    with torch.no_grad():
        built.chunk.module.module.output_layer.weight.mul_(4.0)  # far from uniform, so that a wrong context shows
    built.optimizer.reload_model_params()
    return built


def make_engine(model: Any, **settings: Any) -> Any:
    """`settings` go to Megatron's InferenceConfig."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig

    from megatron_longact.generation.dynamic import DynamicRolloutEngine

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
    from megatron_longact.generation.engine import Prompt

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

    built = build(cuda_graphs=cuda_graphs)
    model = unwrap_model(built.chunk)
    sampling = Sampling(max_response_length=48, seed=1)
    with LongAct.attach([built.chunk], built.optimizer, LongActConfig()) as longact:
        engine = make_engine(model, **SETTINGS[name])
        first = check(engine, model, sampling)
        assert not InferenceMode.is_active()
        assert not any(isinstance(module, CudaGraphManager) for module in model.modules())
        train_step(built, longact, seed=7, length=256)
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

    model = unwrap_model(build(cuda_graphs=cuda_graphs).chunk)
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

    model = unwrap_model(build(cuda_graphs=False).chunk)
    before = torch.cuda.memory_allocated()
    engine = make_engine(model, kv_cache_management_mode=mode)
    engine.generate(make_prompts(), Sampling(max_response_length=4))
    held = torch.cuda.memory_allocated() - before
    assert held > 0.9 * BUFFER_BYTES if mode == "persist" else held < 0.1 * BUFFER_BYTES
