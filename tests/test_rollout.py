"""Rollouts by megatron-core's engine, on real models and real ranks, against full forwards without a cache."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact.generation.sampling import Sampling, draw, sampled_log_probs, uniform_numbers
from tests import ranks
from tests.ranks import Layout

LOG_PROB_TOLERANCE = 2e-5
"""fp32; the cache and the full forward multiply matrices of other shapes, shards add in another order."""

EOD = 5
RESPONSE = 6
LAYOUTS = {
    "tp1": (Layout(), 1),
    "tp2 sequence parallel": (Layout(tp=2), 2),
    "pp2": (Layout(pp=2), 2),
    "pp2, virtual": (Layout(pp=2, vpp=2), 2),
    "cp2": (Layout(cp=2), 2),
}


def make_prompts(copies: int = 3) -> list[Any]:
    """Prompts of two lengths, several samples of each, in an order that no batch can keep."""
    from megatron_longact.generation.engine import Prompt

    generator = torch.Generator().manual_seed(3)
    tokens = [tuple(torch.randint(64, (n,), generator=generator).tolist()) for n in (9, 14, 9, 14, 9)]
    return [Prompt(t, i, j) for j in range(copies) for i, t in enumerate(tokens)]


def make_engine(model: Any, *later_chunks: Any, **settings: Any) -> Any:
    from megatron.core import parallel_state

    from megatron_longact.generation.static import StaticRolloutEngine

    return StaticRolloutEngine(
        model,
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_group=parallel_state.get_expert_tensor_and_model_parallel_group(),
        **{"eod": EOD, "vocab_size": 64, "max_batch_size": 16, "later_chunks": later_chunks, **settings},
    )


def make_model(**spec: Any) -> Any:
    """Chunks of a small model; with tensor parallelism it is sequence parallel."""
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size

    from tests.models import ModelSpec, build

    config = {"sequence_parallel": get_tensor_model_parallel_world_size() > 1} | spec.pop("config", {})
    return build(ModelSpec(layers=4, config=config, **spec))


def generate(sampling: Sampling, *, copies: int = 3, **settings: Any) -> dict[str, Tensor]:
    chunks = [chunk.module for chunk in make_model().chunks]
    return vars(make_engine(*chunks, **settings).generate(make_prompts(copies), sampling))


def score(sampling: Sampling, **spec: Any) -> dict[str, Tensor]:
    """Sample, then score the responses by the trainer's forward: log-probs [n, R] both ways, and the mask."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.rl.batches.micro_batches import make_micro_batch
    from megatron_longact.rl.batches.plans import MicroBatchPlan
    from megatron_longact.rl.batches.rollout_batch import RolloutBatch
    from megatron_longact.rl.log_probs import ResponseScorer, score_responses

    chunks = make_model(**spec).chunks
    prompts = make_prompts()
    rollouts = make_engine(*(chunk.module for chunk in chunks)).generate(prompts, sampling)
    n = len(prompts)
    batch = RolloutBatch(
        step=0,
        prompts=[p.tokens for p in prompts],
        responses=rollouts.tokens,
        lengths=rollouts.lengths,
        rollout_log_probs=rollouts.log_probs,
        rewards=torch.zeros(n),
        correct=torch.zeros(n, dtype=torch.bool),
        finished=rollouts.finished,
        advantages=torch.zeros(n),
    )
    plans = [MicroBatchPlan(rows=(i, i + 1, i + 2), longest=20) for i in range(0, n, 3)]
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    scored = score_responses(
        chunks,
        [
            make_micro_batch(batch, p, pad_token=EOD, multiple_of=16, fixed_length=32).shared_by(
                pgs.cp.size(), cp_rank=pgs.cp.rank()
            )
            for p in plans
        ],
        scorer=ResponseScorer(temperature=sampling.temperature, vocab_size=64, tp_group=pgs.tp, cp_group=pgs.cp),
        seq_length=32,
        micro_batch_size=3,
        pg_collection=pgs,
    )
    trained = torch.zeros_like(rollouts.log_probs)
    for plan, rows in zip(plans, scored, strict=True):
        trained[list(plan.rows), : rows.shape[1]] = rows
    return {"rollout": rollouts.log_probs, "trainer": trained, "mask": batch.response_mask}


def argmax_of_full_forwards() -> list[list[int]]:
    """Greedy decoding written out: one whole forward a token, no cache, no batch."""
    model = make_model().chunks[0].module.eval()
    responses = []
    for prompt in make_prompts(copies=1):
        tokens = list(prompt.tokens)
        while len(tokens) < len(prompt.tokens) + RESPONSE and tokens[-1:] != [EOD]:
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            tokens.append(int(logits[0, -1].argmax()))
        responses.append(tokens[len(prompt.tokens) :])
    return responses


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_is_the_argmax_of_a_full_forward(name: str) -> None:
    layout, world_size = LAYOUTS[name]
    [expected] = ranks.run(argmax_of_full_forwards)
    sampling = Sampling(max_response_length=RESPONSE, greedy=True)
    for got in ranks.run(generate, layout=layout, world_size=world_size, sampling=sampling, copies=1):
        responses = [row[:n].tolist() for row, n in zip(got["tokens"], got["lengths"], strict=True)]
        assert responses == expected


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_router_load_balancing_type": "none",
}
SPECS: dict[str, dict[str, Any]] = {"yarn": {"yarn": True}, "ep2": {"config": EXPERTS}}


@pytest.mark.parametrize("name", [*LAYOUTS, *SPECS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainers_forward(name: str, temperature: float) -> None:
    """Also where YaRN takes them beyond the original length."""
    layout, world_size = {**LAYOUTS, "ep2": (Layout(ep=2), 2)}.get(name, (Layout(), 1))
    sampling = Sampling(max_response_length=RESPONSE, temperature=temperature, seed=2)
    for got in ranks.run(score, layout=layout, world_size=world_size, sampling=sampling, **SPECS.get(name, {})):
        mask = got["mask"]
        difference = (got["rollout"] - got["trainer"]).abs()[mask]
        assert difference.max() < LOG_PROB_TOLERANCE
        assert got["rollout"][mask].max() < 0
        assert (got["rollout"][~mask] == 0).all()


def test_a_response_does_not_depend_on_its_batch() -> None:
    """Sampled alone, together, or with prompts prefilled once for all their samples: the same tokens."""
    sampling = Sampling(max_response_length=RESPONSE, seed=11, step=4)
    [together] = ranks.run(generate, sampling=sampling)
    [in_twos] = ranks.run(generate, sampling=sampling, max_batch_size=2)
    [alone] = ranks.run(generate, sampling=sampling, max_batch_size=1)
    on_two_replicas = ranks.run(generate, world_size=2, sampling=sampling)
    for other in (in_twos, alone, *on_two_replicas):
        assert torch.equal(other["tokens"], together["tokens"])
        assert torch.equal(other["lengths"], together["lengths"])
        torch.testing.assert_close(other["log_probs"], together["log_probs"], rtol=0, atol=LOG_PROB_TOLERANCE)
    assert len({tuple(row.tolist()) for row in together["tokens"]}) > 10


def generate_with_experts(sampling: Sampling, dispatcher: str) -> tuple[int, dict[str, Tensor]]:
    """The number of replicas, and responses to prompts of three lengths, which end at different steps."""
    from megatron_longact.generation.engine import Prompt

    [chunk] = make_model(config={**EXPERTS, "moe_token_dispatcher_type": dispatcher}).chunks
    generator = torch.Generator().manual_seed(3)
    lengths = (9, 9, 30, 50, 9)
    prompts = [Prompt(tuple(torch.randint(64, (n,), generator=generator).tolist()), i) for i, n in enumerate(lengths)]
    engine = make_engine(chunk.module, max_batch_size=2, stop_ids=range(6, 20))
    return engine.replicas.count, vars(engine.generate(prompts, sampling))


@pytest.mark.parametrize(
    ("dispatcher", "tp", "replicas"), [("allgather", 1, 1), ("alltoall", 1, 1), ("alltoall", 1, 2), ("allgather", 2, 1)]
)
def test_ranks_that_share_experts_generate_together(dispatcher: str, tp: int, replicas: int) -> None:
    """Each layer of experts waits for all of them: they take the same steps, and are one replica."""
    sampling = Sampling(max_response_length=RESPONSE, seed=11)
    [(_, alone)] = ranks.run(generate_with_experts, sampling=sampling, dispatcher=dispatcher)
    assert len(set(alone["lengths"].tolist())) > 1
    run: dict[str, Any] = {"layout": Layout(tp=tp, ep=2), "world_size": 2 * tp * replicas, "dispatcher": dispatcher}
    for count, got in ranks.run(generate_with_experts, sampling=sampling, **run):
        assert count == replicas
        assert torch.equal(got["tokens"], alone["tokens"])
        torch.testing.assert_close(got["log_probs"], alone["log_probs"], rtol=0, atol=LOG_PROB_TOLERANCE)


def keys_rotated_once_and_anew() -> tuple[list[int], dict[str, Tensor], dict[str, Tensor]]:
    """Tokens a call of RoPE; the responses; and those of the engine as Megatron has it."""
    from contextlib import nullcontext
    from unittest.mock import patch

    from megatron.core.transformer import attention

    from megatron_longact.generation import static

    model = make_model().chunks[0].module
    sampling = Sampling(max_response_length=RESPONSE, seed=3)
    calls: list[int] = []

    def counted(tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(tokens))
        return rotate(tokens, *args, **kwargs)

    rotate = attention.apply_rotary_pos_emb
    with patch.object(attention, "apply_rotary_pos_emb", counted):
        once = make_engine(model).generate(make_prompts(), sampling)
    assert not any("_adjust_key_value_for_inference" in vars(module) for module in model.modules())
    with patch.object(static, "rotated_keys", lambda model: nullcontext()):
        anew = make_engine(model).generate(make_prompts(), sampling)
    return calls, vars(once), vars(anew)


def test_keys_are_rotated_once_and_the_same_to_the_bit() -> None:
    for calls, once, anew in ranks.run(keys_rotated_once_and_anew, layout=Layout(tp=2), world_size=2):
        assert sorted(set(calls)) == [1, 9]  # of decoding, and of the shortest prompts, queries alone
        for name, expected in anew.items():
            assert torch.equal(once[name], expected), name


def test_seed_and_step_choose_the_random_numbers() -> None:
    base = Sampling(max_response_length=RESPONSE, seed=11, step=4)
    [first] = ranks.run(generate, sampling=base)
    [again] = ranks.run(generate, sampling=base)
    assert torch.equal(first["tokens"], again["tokens"])
    for other in (replace(base, seed=12), replace(base, step=5)):
        [got] = ranks.run(generate, sampling=other)
        assert not torch.equal(first["tokens"], got["tokens"])


def test_responses_end_at_the_end_of_text_token() -> None:
    [got] = ranks.run(generate, sampling=Sampling(max_response_length=24, temperature=1.5, seed=1), copies=8)
    assert got["finished"].any()
    assert not got["finished"].all()
    for row, length, finished in zip(got["tokens"], got["lengths"].tolist(), got["finished"], strict=True):
        inside = row[:length].tolist()
        assert inside.count(EOD) == int(finished)
        assert (inside[-1] == EOD) == bool(finished)
        assert (row[length:] == EOD).all()
        assert bool(finished) or length == 24


def count_forwards() -> tuple[int, dict[str, Tensor]]:
    from tests.models import ModelSpec, build

    model = build(ModelSpec(layers=2)).chunks[0].module
    calls: list[None] = []
    handle = model.register_forward_hook(lambda *_: calls.append(None))
    [first] = [make_prompts(1)[0]]
    greedy = Sampling(max_response_length=1, greedy=True)
    token = int(make_engine(model).generate([first], greedy).tokens[0, 0])
    calls.clear()
    long = replace(greedy, max_response_length=20)
    rollouts = make_engine(model, stop_ids=(token,)).generate([first], long)
    handle.remove()
    return len(calls), vars(rollouts)


def test_generation_stops_when_all_have_ended() -> None:
    [(forwards, got)] = ranks.run(count_forwards)
    assert forwards == 1
    assert got["lengths"].tolist() == [1]
    assert got["finished"].tolist() == [True]


def test_each_of_several_tokens_ends_a_response() -> None:
    """Two more ends than eod: everything up to the first of them is as without, and the engine runs no longer."""
    sampling = Sampling(max_response_length=24, seed=2)
    [long] = ranks.run(generate, sampling=sampling)
    stops = (int(long["tokens"][0, 2]), int(long["tokens"][1, 4]))
    for got in ranks.run(generate, layout=Layout(tp=2), world_size=2, sampling=sampling, stop_ids=stops):
        assert_cut_at(got, long, (EOD, *stops))
    assert got["lengths"][0] <= 3


def assert_cut_at(got: dict[str, Tensor], long: dict[str, Tensor], stops: tuple[int, ...]) -> None:
    for row, whole in enumerate(long["tokens"].tolist()):
        ends = [i for i, token in enumerate(whole) if token in stops]
        length = ends[0] + 1 if ends else len(whole)
        assert int(got["lengths"][row]) == length
        assert bool(got["finished"][row]) == bool(ends)
        assert got["tokens"][row].tolist() == whole[:length] + [EOD] * (len(whole) - length)
        expected = long["log_probs"][row, :length]
        torch.testing.assert_close(got["log_probs"][row, :length], expected, rtol=0, atol=LOG_PROB_TOLERANCE)
        assert (got["log_probs"][row, length:] == 0).all()


def test_prompts_are_batched_with_their_neighbours_in_length() -> None:
    from megatron_longact.generation.static import batches_of

    lengths = [9, 9, 14, 15, 40, 46, 46, 46]

    def batches(most: int, response_length: int) -> list[list[int]]:
        return [lengths[rows] for rows in batches_of(lengths, most=most, response_length=response_length)]

    assert batches(8, 6) == [[9, 9, 14, 15], [40, 46, 46, 46]]
    assert batches(8, 4) == [[9, 9], [14, 15], [40], [46, 46, 46]]
    assert batches(3, 25) == [[9, 9, 14], [15, 40, 46], [46, 46]]
    assert list(batches_of([], most=3, response_length=5)) == []


def test_padded_vocabulary_is_never_sampled() -> None:
    sampling = Sampling(max_response_length=RESPONSE, temperature=5.0, seed=1)
    [got] = ranks.run(generate, sampling=sampling, vocab_size=10, copies=8)
    assert got["tokens"].max() < 10


def sequence_parallel_switches(model: Any) -> list[Any]:
    return [getattr(each, "sequence_parallel", None) for m in model.modules() for each in (m, getattr(m, "config", 0))]


def leaves_nothing_behind(fail: bool) -> dict[str, bool]:
    import random

    import numpy as np
    from megatron.core import tensor_parallel
    from megatron.core.inference.utils import InferenceMode

    from megatron_longact.generation.engine import generation_mode
    from tests.models import random_tokens, train_step

    built = make_model()
    model = built.chunks[0].module
    model.train()
    model.decoder.layers[0].eval()  # one module has a mode of its own
    modes = [m.training for m in model.modules()]
    switches = sequence_parallel_switches(model)
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()

    def generators() -> list[Any]:
        return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]

    before = generators()
    try:
        with generation_mode(model):
            make_engine(model).generate(make_prompts(), Sampling(max_response_length=2))
            random.random(), np.random.rand(), torch.rand(1)
            if fail:
                raise KeyError
    except KeyError:
        pass
    after = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "modes": modes == [m.training for m in model.modules()],
        "sequence parallel": switches == sequence_parallel_switches(model),
        "generators": before == generators(),
        "tracker": all(torch.equal(after[k], tracker[k]) for k in tracker),
        "inference mode off": not InferenceMode.is_active(),
        "trains": train_step(built, random_tokens(4, 16))[0],  # as long as a cached RoPE table of the engine
    }


@pytest.mark.parametrize("fail", [False, True])
def test_generation_leaves_nothing_behind(fail: bool) -> None:
    for kept in ranks.run(leaves_nothing_behind, layout=Layout(tp=2), world_size=2, fail=fail):
        assert all(kept.values()), kept


def kept_by_fp8_layers(fp8: bool) -> tuple[bool, list[int], bool]:
    """Whether a scale made in a rollout is of inference mode, weights in FP8 inside and after, if that mode is back.

    The module stands for one of Transformer Engine: it makes its scale in its first forward, and keeps its weight.
    """
    from types import SimpleNamespace

    from megatron_longact.generation.engine import generation_mode

    module = torch.nn.Linear(1, 1)
    module.config = SimpleNamespace(fp8="hybrid" if fp8 else None)
    module._fp8_workspaces = {"weight": torch.zeros(1)}
    model = torch.nn.ModuleList([module])
    kept = []
    with generation_mode(model):
        kept.append(len(module._fp8_workspaces))
        with torch.inference_mode():
            scale = torch.ones(1)
            module._fp8_workspaces["weight"] = scale
            assert not torch.is_grad_enabled()
    kept.append(len(module._fp8_workspaces))
    with torch.inference_mode():
        back = torch.ones(1).is_inference()
    return scale.is_inference(), kept, back


def test_rollouts_and_training_share_nothing_of_layers_in_fp8() -> None:
    assert ranks.run(kept_by_fp8_layers, fp8=True)[0] == (False, [0, 0], True)
    assert ranks.run(kept_by_fp8_layers, fp8=False)[0] == (True, [1, 1], True)


def test_draw_follows_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    tokens = draw(probs.log().expand(len(uniforms), -1), uniforms)
    shares = tokens.bincount(minlength=4) / len(tokens)
    torch.testing.assert_close(shares, probs, rtol=0, atol=2e-4)
    assert shares[1] == 0


def test_draw_never_takes_an_impossible_token() -> None:
    log_probs = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(log_probs, ends).tolist() == [1, 1]


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    sampling = Sampling(max_response_length=1)

    def probs(**changes: Any) -> list[float]:
        return sampled_log_probs(logits, sampling=replace(sampling, **changes)).exp()[0].tolist()

    assert probs() == pytest.approx([0.5, 0.2, 0.2, 0.1])
    assert probs(top_k=1) == pytest.approx([1, 0, 0, 0])
    assert probs(top_p=0.4) == pytest.approx([1, 0, 0, 0])
    assert probs(top_p=0.6) == pytest.approx([5 / 7, 2 / 7, 0, 0])
    assert probs(top_p=1.0) == probs(top_k=-1) == probs()
    assert probs(temperature=0.5)[0] == pytest.approx(0.25 / 0.34)


def test_random_numbers_are_a_function_of_their_indices() -> None:
    base = (1, 2, 3, 4)
    long, short = uniform_numbers(*base, count=8), uniform_numbers(*base, count=3)
    assert (long[:3] == short).all()
    for i in range(4):
        other = [*base]
        other[i] += 1
        assert (uniform_numbers(*other, count=8) != long).all()


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 1.5}, {"max_response_length": 0}])
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**{"max_response_length": 1, **bad})
