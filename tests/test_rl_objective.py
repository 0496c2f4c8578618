"""The objective on Megatron's schedule: one loss and one gradient, whatever the micro-batches and the layout."""

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from tests import ranks
from tests.ranks import Layout

pytestmark = pytest.mark.timeout(300)  # the first test runs all layouts

RELATIVE = 2e-5
"""fp32; sums over tokens and shards are rounded in another order."""

EOD, SEQ_LENGTH, N = 5, 32, 8


@dataclass(frozen=True)
class Case:
    """How a step is laid out; micro_batch_size None: packed into rows; chunk: tokens whose logits are made at once."""

    layout: Layout = field(default_factory=Layout)
    ranks: int = 1
    micro_batch_size: int | None = 8
    chunk: int = 1024
    sequence_parallel: bool = False
    shared: bool = False


FIRST = "micro-batches of 8"
CASES = {
    FIRST: Case(),
    "packed": Case(micro_batch_size=None),
    "micro-batches of 1, logits of 8 tokens at once": Case(micro_batch_size=1, chunk=8),
    "dp2": Case(ranks=2, micro_batch_size=2),
    "pp2 packed": Case(Layout(pp=2), 2, None),
    "pp2, virtual, packed": Case(Layout(pp=2, vpp=2), 2, None),
    "tp2, logits of 9 tokens at once": Case(Layout(tp=2), 2, 4, 9),
    "cp2": Case(Layout(cp=2), 2, 2),
    "cp2, packed, logits of 9 tokens at once": Case(Layout(cp=2), 2, None, 9),
    "cp2 dp2": Case(Layout(cp=2), 4, 2),
    "tp2 cp2 sequence parallel, packed": Case(Layout(tp=2, cp=2), 4, None, sequence_parallel=True),
    "pp2 cp2, virtual": Case(Layout(pp=2, vpp=2, cp=2), 4, 2),
    "tp2 sequence parallel, logits of 9 tokens at once": Case(Layout(tp=2), 2, 4, 9, sequence_parallel=True),
    "shared": Case(micro_batch_size=None, shared=True),
    "tp2 dp2 sequence parallel, shared": Case(Layout(tp=2), 4, None, 9, sequence_parallel=True, shared=True),
    "pp2 shared": Case(Layout(pp=2), 2, 4, shared=True),
}
OBJECTIVES = {
    "grpo": "token-mean",
    "gspo": "seq-mean-token-mean",  # the ratio of a whole response
    "kl-cov": "token-mean",
    "clip-cov": "token-mean",
}
"""Policy losses, and how they are aggregated."""

OF_EVERY_CASE = {"grpo", "kl-cov"}
"""One that looks at a rank's own tokens alone, and one that chooses among all."""
OF_ALL_OBJECTIVES = {FIRST, "packed", "dp2", "pp2 packed", "tp2, logits of 9 tokens at once", "cp2 dp2"}
"""Cases that differ in what the other objectives see."""


def losses_of(case: str) -> list[str]:
    return [loss for loss in OBJECTIVES if loss in OF_EVERY_CASE or case in OF_ALL_OBJECTIVES]


def make_batch() -> Any:
    from megatron_longact.rl.batches.rollout_batch import RolloutBatch

    generator = torch.Generator().manual_seed(5)

    def log_probs() -> torch.Tensor:
        return -4 - 0.3 * torch.rand(N, 6, generator=generator)

    prompts = [tuple(torch.randint(64, (8 + 3 * i,), generator=generator).tolist()) for i in range(3)]
    return RolloutBatch(
        step=0,
        prompts=[prompts[i] for i in (0, 1, 0, 2, 1, 1, 0, 1)],
        responses=torch.randint(64, (N, 6), generator=generator),
        lengths=torch.tensor([6, 1, 4, 6, 2, 5, 3, 6]),
        rollout_log_probs=log_probs(),
        rewards=torch.zeros(N),
        correct=torch.zeros(N, dtype=torch.bool),
        finished=torch.ones(N, dtype=torch.bool),
        advantages=torch.randn(N, generator=generator),
        old_log_probs=log_probs(),
        ref_log_probs=log_probs(),
    )


def grpo_config(**settings: Any) -> Any:
    """A configuration of a small run, with some settings of one's own."""
    from megatron_longact.rl.config import RLConfig
    from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig

    defaults: dict[str, Any] = {
        "run_dir": "runs/x",
        "prompts_per_step": N,
        "group_size": 1,
        "epochs": 1,
        "global_batch_size": N,
        "micro_batch_size": N,
        "seq_length": SEQ_LENGTH,
        "max_response_length": 6,
        "loss": PolicyLossConfig(),
        "kl_beta": 0.0,
        "context_lengths": (8,),
        "heldout_context_lengths": (8,),
        "heldout_prompts": 1,
        "seed": 1,
    }
    return RLConfig(**{**defaults, **settings})


def step(policy_loss: str, aggregation: str, case: Case) -> dict[str, Any]:
    """One optimizer step: gradients of the whole model, their norm, the reported means, selections and masks."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact import LongAct, LongActConfig
    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
    from megatron_longact.rl.objectives.objective import Objective
    from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig
    from megatron_longact.rl.objectives.token_selection import TokenSelector
    from tests.models import ModelSpec, _named_shards, build

    packed = case.micro_batch_size is None
    config = grpo_config(
        policy_loss=policy_loss,
        **({"pack_sequences": True} if packed else {"micro_batch_size": case.micro_batch_size}),
        shared_prompts=case.shared,
        loss=PolicyLossConfig(
            clip_low=0.1,
            clip_high=0.2,
            kl_cov_ratio=0.2,
            clip_cov_ratio=0.2,
            clip_cov_lower=-10.0,
            aggregation=aggregation,
        ),
        temperature=0.8,
        kl_beta=0.1,
    )
    built = build(ModelSpec(layers=4, config={"sequence_parallel": case.sequence_parallel}))
    batch = make_batch()
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    layout = BatchLayout.of_rank(config, pgs, pad_token=EOD, multiple_of=16, step_multiple=2 if case.layout.vpp else 1)
    [plan] = layout.plan(batch)
    scorer = ResponseScorer(temperature=0.8, vocab_size=64, tp_group=pgs.tp, cp_group=pgs.cp, chunk_size=case.chunk)
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(ratio=0.4))
    objective = Objective(config, scorer, longact, dp_size=pgs.dp.size())
    trainer_log_probs = TrainerLogProbs(built.chunks, scorer, layout, pg_collection=pgs)
    selected = TokenSelector(config, trainer_log_probs).select(batch, plan, update=1)
    micro_batches = [layout.micro_batch(batch, part, selected=selected) for part in plan.micro_batches]
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=objective.forward_step(batch.response_mask, num_microbatches=len(plan.micro_batches)),
        data_iterator=[iter(micro_batches) for _ in built.chunks],
        model=built.chunks,
        num_microbatches=len(plan.micro_batches),
        seq_length=SEQ_LENGTH,
        micro_batch_size=layout.micro_batch_size,
        forward_only=False,
    )
    gradients = {}
    for chunk in built.chunks:
        for name, parameter, shard in _named_shards(chunk.module):
            parts = [torch.empty_like(parameter.main_grad) for _ in range(shard.size)]
            if shard.size > 1:
                dist.all_gather(parts, parameter.main_grad, group=pgs.tp)
            gradients[name] = torch.cat(parts, shard.dim) if shard.size > 1 else parameter.main_grad.clone()
    sums = {}
    for name in reports[0] if reports else ():
        total = torch.stack([report[name] for report in reports]).sum(0)
        dist.all_reduce(total, group=pgs.dp_cp)
        sums[name] = float(total[0] / total[1])
    log_probs = trainer_log_probs.of_batch(batch)
    _, grad_norm, _ = built.optimizer.step()
    longact.detach()
    return {
        "gradients": gradients,
        "metrics": sums,
        "grad_norm": grad_norm,
        "log_probs": log_probs,
        "selected": selected,
        "saliency": longact.saliency,
        "masks": longact.masks,
    }


def steps(case: Case, losses: list[str]) -> dict[str, dict[str, Any]]:
    """A step of each of some objectives."""
    return {loss: step(loss, OBJECTIVES[loss], case) for loss in losses}


@pytest.fixture(scope="module")
def by_case() -> dict[str, list[dict[str, dict[str, Any]]]]:
    """What each rank of each case has, by objective."""
    return {
        name: ranks.run(steps, layout=case.layout, world_size=case.ranks, case=case, losses=losses_of(name))
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("policy_loss", OBJECTIVES)
def test_loss_gradient_and_masks_do_not_depend_on_the_layout(policy_loss: str, by_case: dict[str, Any]) -> None:
    of_loss = {name: on_ranks for name, on_ranks in by_case.items() if policy_loss in losses_of(name)}
    results = {name: [rank[policy_loss] for rank in on_ranks] for name, on_ranks in of_loss.items()}
    assert len(results) >= len(OF_ALL_OBJECTIVES)
    expected = results[FIRST][0]
    metrics = expected["metrics"]
    assert metrics["kl"] > 0
    if "cov" in policy_loss:
        assert 0.05 < metrics["selected_fraction"] < 0.2
        assert expected["selected"].sum() == round(metrics["selected_fraction"] * 33)
    else:
        assert metrics["clip_fraction"] > 0
    for name, by_rank in results.items():
        gradients = {k: v for result in by_rank for k, v in result["gradients"].items()}
        assert gradients.keys() == expected["gradients"].keys()
        for key, gradient in gradients.items():
            scale = expected["gradients"][key].abs().max()
            assert scale > 0, key
            assert (gradient - expected["gradients"][key]).abs().max() <= RELATIVE * scale, (name, key)
        for result in by_rank:
            if expected["selected"] is not None:
                assert torch.equal(result["selected"], expected["selected"]), name
            if result["metrics"]:
                assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4), name
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=RELATIVE), name
            torch.testing.assert_close(result["log_probs"], expected["log_probs"], rtol=RELATIVE, atol=0)
            for layer, masks in expected["masks"].items():
                for part, mask in masks.items():
                    assert torch.equal(result["masks"][layer][part], mask), (name, layer, part)
                    saliency = expected["saliency"][layer][part]
                    torch.testing.assert_close(result["saliency"][layer][part], saliency, rtol=RELATIVE, atol=0)


def peak_of_scoring(response_length: int, vocab: int) -> int:
    """Bytes at the peak of a forward and backward through the output layer, logits of 32 tokens at once."""
    from megatron.core import parallel_state

    from megatron_longact.rl.batches.micro_batches import make_micro_batch
    from megatron_longact.rl.batches.plans import MicroBatchPlan
    from megatron_longact.rl.log_probs import ResponseScorer
    from tests.models import ModelSpec, build

    n, tokens = 1, response_length
    batch = replace(
        make_batch(),
        prompts=[(1, 2, 3, 4)],
        responses=torch.zeros(n, tokens, dtype=torch.int64),
        lengths=torch.tensor([tokens]),
        old_log_probs=None,
        ref_log_probs=None,
    )
    micro_batch = make_micro_batch(batch, MicroBatchPlan(rows=(0,), longest=tokens + 4), pad_token=EOD, multiple_of=1)
    model = build(ModelSpec(layers=1, vocab=vocab, max_length=tokens + 4)).chunks[0].module
    hidden_states = torch.randn(tokens + 4, 1, 32, requires_grad=True)
    scorer = ResponseScorer(
        temperature=0.8,
        vocab_size=vocab - 1,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        chunk_size=32,
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        scorer._process(
            hidden_states=hidden_states,
            output_layer=model.output_layer,
            output_weight=None,
            scale_logits=lambda logits: logits,
            context=micro_batch,
        )[0].sum().backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_of_a_long_response_are_never_in_memory_at_once(tp: int) -> None:
    vocab = 4096
    run = {"layout": Layout(tp=tp), "world_size": tp, "vocab": vocab}
    short, long = (ranks.run(peak_of_scoring, **run, response_length=n)[0] for n in (128, 1024))
    whole = 1024 * vocab // tp * 4
    assert long < whole / 2
    assert long - short < (1024 - 128) * 32 * 4 * 8  # a few hidden states a token, and no logits
