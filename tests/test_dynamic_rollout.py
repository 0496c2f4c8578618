"""Rollouts by megatron-core's dynamic engine on the CPU, against the static engine and the trainer's forward.

The engine, its scheduler, its paged cache and Megatron's attention are the real ones; only the kernels of flash-attn,
which have no CPU path, are written out in plain torch (`attention_on_cpu`). CUDA graphs and the kernels: tests/gpu.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact.generation.sampling import Sampling
from tests import ranks
from tests.ranks import Layout
from tests.test_rollout import EOD, LOG_PROB_TOLERANCE, RESPONSE, assert_cut_at, make_prompts

BLOCK = 4
"""Tokens of a cache block here: sequences of these tests cross several."""


def paged_attention(q: Tensor, k: Tensor, v: Tensor, *, kv_length: int, blocks: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries [s, np, hn] of one sequence over a cache [blocks, block, ng, hn]."""
    keys, values = (cache[blocks[blocks >= 0].long()].flatten(0, 1)[:kv_length] for cache in (k, v))
    repeats = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(kv_length - q.shape[0] + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **kwargs: Any
) -> Tensor:
    output = torch.zeros_like(q)
    for i, blocks in enumerate(kwargs["block_table"]):
        begin, end = cu_seqlens_q[i : i + 2].tolist()
        length = int(cu_seqlens_k[i + 1] - cu_seqlens_k[i])
        if end > begin:
            output[begin:end] = paged_attention(
                q[begin:end], k, v, kv_length=length, blocks=blocks, scale=kwargs["softmax_scale"]
            )
    return output


def flash_attn_with_kvcache(q: Tensor, **kwargs: Any) -> Tensor:
    output = torch.zeros_like(q)
    for i, (blocks, length) in enumerate(zip(kwargs["block_table"], kwargs["cache_seqlens"].tolist(), strict=True)):
        if length > 0:
            output[i] = paged_attention(
                q[i],
                kwargs["k_cache"],
                kwargs["v_cache"],
                kv_length=length,
                blocks=blocks,
                scale=kwargs["softmax_scale"],
            )
    return output


@contextmanager
def attention_on_cpu() -> Iterator[None]:
    """Megatron's dynamic batching with attention kernels in plain torch, for the length of the block."""
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.transformer import attention

    stand_ins = {
        (attention, "is_fa_min_version"): lambda version: True,
        (attention, "flash_attn_varlen_func"): flash_attn_varlen_func,
        (attention, "flash_attn_with_kvcache"): flash_attn_with_kvcache,
        (attention, "rearrange"): lambda x, pattern: x.flatten(2),  # 's b h d -> s b (h d)'; einops is not here
        (dynamic_context, "triton_append_key_value_cache"): None,  # Megatron then appends by indexing
    }
    own = {(module, name): getattr(module, name) for module, name in stand_ins}
    for (module, name), value in stand_ins.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in own.items():
            setattr(module, name, value)


def make_dynamic_engine(model: Any, **settings: Any) -> Any:
    """An engine of few and small blocks; `settings` go to Megatron's InferenceConfig."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig

    from megatron_longact.generation.dynamic import DynamicRolloutEngine

    eod, vocab_size = settings.pop("eod", EOD), settings.pop("vocab_size", 64)
    stop_ids = settings.pop("stop_ids", ())
    defaults = {"block_size_tokens": BLOCK, "buffer_size_gb": 1e-3, "max_sequence_length": 64, "max_requests": 16}
    return DynamicRolloutEngine(
        model,
        config=InferenceConfig(**{**defaults, "max_tokens": 256, **settings}),
        eod=eod,
        vocab_size=vocab_size,
        stop_ids=stop_ids,
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        mp_group=parallel_state.get_model_parallel_group(),
    )


def generate_all(samplings: list[Sampling], *, static: bool, **settings: Any) -> list[dict[str, Tensor]]:
    from tests.models import ModelSpec, build
    from tests.test_rollout import make_engine

    config = {"sequence_parallel": settings.pop("sequence_parallel", False)}
    spec = ModelSpec(layers=2, dtype=settings.pop("dtype", "fp32"), config=config, yarn=settings.pop("yarn", False))
    model = build(spec).chunks[0].module
    model = getattr(model, "module", model)  # bf16 has one wrapper more
    with attention_on_cpu():
        engine = make_engine(model) if static else make_dynamic_engine(model, **settings)
        return [vars(engine.generate(make_prompts(), sampling)) for sampling in samplings]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ("tokens", "lengths", "finished"):
        assert torch.equal(got[name], expected[name]), name
    torch.testing.assert_close(got["log_probs"], expected["log_probs"], rtol=0, atol=LOG_PROB_TOLERANCE)


LAYOUTS = {
    "tp1": (Layout(), 1, {}),
    "tp2": (Layout(tp=2), 2, {}),
    "tp2 sequence parallel": (Layout(tp=2), 2, {"sequence_parallel": True}),
    "pp2": (Layout(pp=2), 2, {}),
    "cp2": (Layout(cp=2), 2, {}),
    "dp2 shared prefixes": (Layout(), 2, {"enable_prefix_caching": True}),
}
SAMPLINGS = [
    Sampling(max_response_length=RESPONSE, greedy=True),
    Sampling(max_response_length=RESPONSE, seed=11, step=4),
    Sampling(max_response_length=RESPONSE, temperature=0.7, top_p=0.8, seed=2),
    Sampling(max_response_length=24, temperature=1.5, top_k=20, top_p=0.95, seed=1),
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_says_what_the_static_engine_says(name: str) -> None:
    """Same tokens, greedy and sampled, and log-probs, though the batches are composed otherwise."""
    layout, world_size, settings = LAYOUTS[name]
    [all_expected] = ranks.run(generate_all, samplings=SAMPLINGS, static=True)
    everywhere = ranks.run(
        generate_all, layout=layout, world_size=world_size, samplings=SAMPLINGS, static=False, **settings
    )
    for everything in everywhere:
        for got, expected in zip(everything, all_expected, strict=True):
            assert_same(got, expected)
    assert all(len({tuple(row.tolist()) for row in expected["tokens"]}) >= 5 for expected in all_expected)
    assert all_expected[-1]["finished"].any()
    assert not all_expected[-1]["finished"].all()


def test_with_yarn_too_beyond_the_original_length() -> None:
    [all_expected] = ranks.run(generate_all, samplings=SAMPLINGS[:2], static=True, yarn=True)
    [everything] = ranks.run(generate_all, samplings=SAMPLINGS[:2], static=False, yarn=True)
    for got, expected in zip(everything, all_expected, strict=True):
        assert_same(got, expected)


def test_each_of_several_tokens_ends_a_response() -> None:
    sampling = [Sampling(max_response_length=24, seed=2)]
    [[long]] = ranks.run(generate_all, samplings=sampling, static=True)
    stops = (int(long["tokens"][0, 2]), int(long["tokens"][1, 4]))
    [[got]] = ranks.run(generate_all, samplings=sampling, static=False, stop_ids=stops)
    assert_cut_at(got, long, (EOD, *stops))


def test_bf16_models_have_a_bf16_cache() -> None:
    """First tokens only: what follows depends on roundings that no two kernels share."""
    greedy = [Sampling(max_response_length=2, greedy=True)]
    [[expected]] = ranks.run(generate_all, samplings=greedy, static=True, dtype="bf16")
    [[got]] = ranks.run(generate_all, samplings=greedy, static=False, dtype="bf16")
    same = got["tokens"][:, 0] == expected["tokens"][:, 0]
    assert same.sum() >= 12
    difference = (got["log_probs"] - expected["log_probs"])[same, 0].abs()
    assert difference.max() < 0.1  # bf16 logits of size 4 have steps of 0.03


def generate_watched(sampling: Sampling, **settings: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rollouts, and what the engine had to do for them; counted before the engine forgets it."""
    from megatron_longact.generation.dynamic import DynamicRolloutEngine
    from tests.models import ModelSpec, build

    model = build(ModelSpec(layers=2)).chunks[0].module
    seen: dict[str, int] = {}
    run = DynamicRolloutEngine._run

    def watched(self: Any, engine: Any, prompts: Any, sampling: Any) -> tuple[Tensor, Tensor]:
        result = run(self, engine, prompts, sampling)
        seen.update(
            steps=engine.context.step_count,
            evicted=engine.evicted_request_count,
            skipped=engine._prefill_tokens_skipped,
            prefilled=engine.context.lifetime_prefill_token_count,
        )
        return result

    with attention_on_cpu():
        engine = make_dynamic_engine(model, **settings)
        engine._run = watched.__get__(engine)
        return vars(engine.generate(make_prompts(), sampling)), seen


SHORT_OF_MEMORY = 13 * 1024 / 2**30
"""GiB of 13 blocks: 12 and the one that takes padding. 15 sequences need 5 to 7 blocks each."""

PRESSURES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_requests": 1},
    "evicted": {"buffer_size_gb": SHORT_OF_MEMORY},
    "in chunks": {"max_tokens": 64, "enable_chunked_prefill": True},
    "shared": {"enable_prefix_caching": True},
    "shared and kept": {"enable_prefix_caching": True, "prefix_caching_eviction_policy": "lru"},
}


@pytest.mark.parametrize("pressure", PRESSURES)
def test_a_response_does_not_depend_on_the_schedule(pressure: str) -> None:
    """Alone, evicted half-way and prefilled again, prefilled in parts, or from shared blocks: the same tokens."""
    sampling = Sampling(max_response_length=12, seed=11, step=4)
    [(expected, relaxed)] = ranks.run(generate_watched, sampling=sampling)
    [(got, seen)] = ranks.run(generate_watched, sampling=sampling, **PRESSURES[pressure])
    assert_same(got, expected)
    once = 3 * (3 * 9 + 2 * 14)  # tokens of `make_prompts`
    assert relaxed == {"steps": 12, "evicted": 0, "skipped": 0, "prefilled": once}
    assert seen["steps"] > 12
    assert (seen["evicted"] > 0) == (pressure == "evicted")
    # two of three samples find blocks of the prompt; of 9 tokens one block: Megatron never prefills a single token
    assert seen["skipped"] == (2 * BLOCK * (1 * 3 + 3 * 2) if "shared" in pressure else 0)
    assert seen["prefilled"] + seen["skipped"] == once or pressure == "evicted"


def trained_between(mode: str) -> dict[str, Any]:
    """Rollouts before and after the weights move; what a fresh static engine says; and the memory in between."""
    from tests.models import ModelSpec, build
    from tests.test_rollout import make_engine

    model = build(ModelSpec(layers=2)).chunks[0].module
    sampling = Sampling(max_response_length=RESPONSE, seed=3)
    settings = {
        "enable_prefix_caching": True,
        "prefix_caching_eviction_policy": "lru",
        "kv_cache_management_mode": mode,
    }
    with attention_on_cpu():
        engine = make_dynamic_engine(model, **settings)
        first = vars(engine.generate(make_prompts(), sampling))
        held = hasattr(engine._engine.context, "memory_buffer")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        second = vars(engine.generate(make_prompts(), sampling))
    return {
        "first": first,
        "second": second,
        "expected": vars(make_engine(model).generate(make_prompts(), sampling)),
        "held": held,
    }


@pytest.mark.parametrize("mode", ["persist", "recompute"])
def test_it_generates_with_the_weights_as_they_are(mode: str) -> None:
    """No cached block of the old weights is used, and with `recompute` the cache's memory is given back."""
    [got] = ranks.run(trained_between, mode=mode)
    assert_same(got["second"], got["expected"])
    assert not torch.equal(got["first"]["log_probs"], got["second"]["log_probs"])
    assert got["held"] == (mode == "persist")


def leaves_nothing_behind(fail: bool) -> dict[str, bool]:
    import random

    import numpy as np
    from megatron.core.inference.utils import InferenceMode

    from tests.models import ModelSpec, build, random_tokens, train_step

    built = build(ModelSpec(layers=2))
    model = built.chunks[0].module
    model.train()
    model.decoder.layers[0].eval()  # one module has a mode of its own
    modes = [m.training for m in model.modules()]
    sampling = Sampling(max_response_length=4, seed=1)

    def generators() -> list[Any]:
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before, calls = generators(), []

    def break_third_forward(*_: Any) -> None:
        calls.append(None)
        if fail and len(calls) == 3:
            raise KeyError("in the middle")

    with attention_on_cpu():
        engine = make_dynamic_engine(model)
        handle = model.register_forward_hook(break_third_forward)
        try:
            rollouts = engine.generate(make_prompts(), sampling)
        except KeyError:
            rollouts = None
        handle.remove()
        kept = {
            "failed as it should": (rollouts is None) == fail,
            "modes": modes == [m.training for m in model.modules()],
            "generators": before == generators(),
            "inference mode off": not InferenceMode.is_active(),
            "RoPE tables": not model.rotary_pos_emb(64, packed_seq=False, cp_group=None).is_inference(),
            "trains": train_step(built, random_tokens(4, 64))[0],
        }
        again = engine.generate(make_prompts(), sampling)
        expected = make_dynamic_engine(model).generate(make_prompts(), sampling)
    return kept | {"as if nothing had happened": torch.equal(again.log_probs, expected.log_probs)}


@pytest.mark.parametrize("fail", [False, True])
def test_it_leaves_nothing_behind(fail: bool) -> None:
    [kept] = ranks.run(leaves_nothing_behind, fail=fail)
    assert all(kept.values()), kept


def disagreeing_draws() -> tuple[Tensor, Tensor]:
    """Both ranks of a replica draw for one request, from logits that are not the same."""
    from megatron.core import parallel_state
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams

    from megatron_longact.generation.dynamic import _Draws
    from megatron_longact.generation.engine import Ends
    from tests.models import ModelSpec, transformer_config

    config = InferenceConfig(block_size_tokens=BLOCK, buffer_size_gb=1e-3, max_requests=4, max_tokens=64)
    context = DynamicInferenceContext(transformer_config(ModelSpec()), config)
    [prompt] = make_prompts(1)[:1]
    params = SamplingParams(num_tokens_to_generate=1, termination_id=EOD)
    context.add_request(
        DynamicInferenceRequest(request_id=0, prompt_tokens=torch.tensor(prompt.tokens), sampling_params=params)
    )
    draws = _Draws(
        [prompt],
        Sampling(max_response_length=1, greedy=True),
        vocab_size=64,
        ends=Ends(EOD),
        mp_group=parallel_state.get_model_parallel_group(),
    )
    rank = torch.distributed.get_rank()
    logits = (1 + rank) * torch.eye(64)[rank].expand(4, -1)  # four rows for one request: CUDA graphs pad
    assert draws.sample_kernel(logits, 1, context).tolist() == [0]
    return draws.results()


def test_one_rank_draws_for_its_replica() -> None:
    """Ranks that went on with different tokens would wait for each other for ever."""
    first, second = ranks.run(disagreeing_draws, layout=Layout(tp=2), world_size=2)
    assert first[0].tolist() == second[0].tolist() == [[0]]
    assert torch.equal(first[1], second[1])
    assert first[1].item() == pytest.approx(torch.eye(64)[0].log_softmax(0)[0].item())


def spread_over(lengths: list[int], copies: int, replicas: int, together: bool) -> list[list[int]]:
    from megatron_longact.generation.dynamic import spread
    from megatron_longact.generation.engine import Prompt

    prompts = [Prompt((i,) * n, i, j) for i, n in enumerate(lengths) for j in range(copies)]
    rows = spread(prompts, replicas=replicas, response_length=10, together=together)
    assert sorted(row for own in rows for row in own) == list(range(len(prompts)))
    return rows


def test_long_prompts_do_not_pile_up() -> None:
    [rows] = ranks.run(spread_over, lengths=[100] * 4 + [1000] + [100] * 6, copies=1, replicas=2, together=False)
    assert rows == [[4], [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]]


def test_equal_prompts_stay_together_but_for_more_than_a_share() -> None:
    [rows] = ranks.run(spread_over, lengths=[100, 200], copies=3, replicas=2, together=True)
    assert rows == [[3, 4, 5], [0, 1, 2]]
    [rows] = ranks.run(spread_over, lengths=[100], copies=6, replicas=3, together=True)
    assert rows == [[0, 1], [2, 3], [4, 5]]
    [rows] = ranks.run(spread_over, lengths=[100], copies=1, replicas=3, together=True)
    assert rows == [[0], [], []]


def loads_of_random_prompts() -> None:
    import random

    for seed in range(200):
        numbers = random.Random(seed)
        lengths = [numbers.randint(1, 500) for _ in range(numbers.randint(1, 12))]
        copies, replicas, together = numbers.randint(1, 4), numbers.randint(1, 5), numbers.random() < 0.5
        rows = spread_over(lengths, copies, replicas, together)
        assert rows == spread_over(lengths, copies, replicas, together)
        prompts = [{row // copies for row in own} for own in rows]
        loads = [
            len(own) * 10 + sum(lengths[i] * (1 if together else [r // copies for r in own].count(i)) for i in held)
            for own, held in zip(rows, prompts, strict=True)
        ]
        assert max(loads) - min(loads) <= max(lengths) + 10 * (copies if together else 1)


def test_no_replica_has_more_than_one_piece_too_many() -> None:
    ranks.run(loads_of_random_prompts)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--num-speculative-tokens": ({"num_speculative_tokens": 1}, {}),
    "--inference-dynamic-batching-async-sched-mode": ({"async_sched_mode": "async"}, {}),
    "--rl-kv-cache-management-mode offload": ({"kv_cache_management_mode": "offload"}, {}),
    "--expert-model-parallel-size": ({}, {"expert_model_parallel_size": 2}),
    "--cuda-graph-impl local and --fp8-format": ({}, {"cuda_graph_impl": "local", "fp8": "hybrid"}),
    "--inference-dynamic-batching-max-requests is 15": ({"max_requests": 15}, {"tensor_model_parallel_size": 2}),
    "--inference-dynamic-batching-max-tokens is 100; steps are padded to a multiple, choose 128": (
        {"max_tokens": 100},
        {},
    ),
    "needs 20 positions": ({"max_sequence_length": 19}, {}),
    "needs 5 blocks of the KV cache, which has 4": ({"buffer_size_gb": 5 * 1024 / 2**30}, {}),
}


def refusals() -> list[str]:
    """What is said of each of `REFUSED`, and without the kernels."""
    from tests.models import ModelSpec, build

    model = build(ModelSpec(layers=2)).chunks[0].module

    def said(settings: dict[str, Any], model_settings: dict[str, Any]) -> str:
        own = {name: getattr(model.config, name) for name in model_settings}
        vars(model.config).update(model_settings)
        try:
            make_dynamic_engine(model, **settings).generate(make_prompts(), SAMPLINGS[0])
        except ValueError as error:
            return str(error)
        finally:
            vars(model.config).update(own)
        return "not refused"

    with attention_on_cpu():
        messages = [said(*settings) for settings in REFUSED.values()]
    return [*messages, said({}, {}), too_long_for_a_step()]


def too_long_for_a_step() -> str:
    """What is said before a model is built of prompts that no step takes; nothing is of those that one does."""
    from megatron_longact.generation.from_args import check_longest

    flags = {"inference_dynamic_batching_max_tokens": 512, "enable_chunked_prefill": False}
    check_longest(Namespace(inference_dynamic_batching=False), 513)
    check_longest(Namespace(inference_dynamic_batching=True, **flags), 512)
    check_longest(Namespace(inference_dynamic_batching=True, **flags | {"enable_chunked_prefill": True}), 513)
    try:
        check_longest(Namespace(inference_dynamic_batching=True, **flags), 513)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_what_cannot_work_is_refused_in_one_line() -> None:
    [messages] = ranks.run(refusals)
    too_long = "a prompt of 513 tokens is longer than one step of the inference engine, 512 tokens"
    for expected, message in zip([*REFUSED, "needs flash-attn 2.7.3", too_long], messages, strict=True):
        assert expected in message
        assert "\n" not in message


def configs_from(all_flags: list[list[str]]) -> list[Any]:
    """The InferenceConfig that Megatron's real parser makes of each list of flags, or the refusal."""
    import sys

    from megatron.training.arguments import parse_args

    from megatron_longact.generation.dynamic import inference_config_from_args
    from tests.models import ModelSpec, build

    model, argv, configs = build(ModelSpec(layers=2)).chunks[0].module, sys.argv, []
    for flags in all_flags:
        sys.argv = ["program", "--seq-length=96", *flags]
        try:
            configs.append(vars(inference_config_from_args(parse_args(), model)) | {"pg_collection": None})
        except ValueError as error:
            configs.append(str(error))
    sys.argv = ["program", "--seq-length=96"]
    configs.append(inference_config_from_args(parse_args(), model, longest=512).max_sequence_length)
    sys.argv = argv
    return configs


def test_megatrons_own_flags_configure_it() -> None:
    flags = [
        "--inference-dynamic-batching-max-requests=32",
        "--inference-dynamic-batching-max-tokens=512",
        "--inference-dynamic-batching-buffer-size-gb=2.5",
        "--inference-dynamic-batching-prefix-caching",
        "--rl-kv-cache-management-mode=recompute",
        "--inference-dynamic-batching-num-cuda-graphs=4",
    ]
    expected = {
        "max_requests": 32,
        "max_tokens": 512,
        "max_sequence_length": 96,
        "buffer_size_gb": 2.5,
        "enable_prefix_caching": True,
        "kv_cache_management_mode": "recompute",
        "num_cuda_graphs": None,
    }
    graphs = [*flags, "--cuda-graph-impl=local"]
    [[plain, graphed, refused, longest]] = ranks.run(
        configs_from, all_flags=[flags, graphs, [*graphs, "--rl-training-cuda-graphs"]]
    )
    assert {name: plain[name] for name in expected} == expected
    assert {name: graphed[name] for name in expected} == expected | {"num_cuda_graphs": 4}
    assert "--rl-training-cuda-graphs" in refused
    assert longest == 512
