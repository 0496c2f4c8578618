"""The objective on Megatron's schedule: one loss and one gradient, whatever the micro-batches and the layout."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from tests import ranks
from tests.ranks import Layout

RELATIVE = 2e-5
"""fp32; sums over tokens and shards are rounded in another order."""

EOD, SEQ_LENGTH, N = 5, 32, 8
CASES: dict[str, tuple[Layout, int, Any, int]] = {
    "micro-batches of 8": (Layout(), 1, 8, 1024),
    "packed": (Layout(), 1, "packed", 1024),
    "micro-batches of 1": (Layout(), 1, 1, 1024),
    "logits of 8 tokens at once": (Layout(), 1, 8, 8),
    "tp2": (Layout(tp=2), 2, 4, 1024),
    "tp2 dp2 packed": (Layout(tp=2), 4, "packed", 1024),
    "pp2 packed": (Layout(pp=2), 2, "packed", 1024),
    "tp2, logits of 9 tokens at once": (Layout(tp=2), 2, 4, 9),
    "pp2": (Layout(pp=2), 2, 2, 1024),
    "dp2": (Layout(), 2, 2, 1024),
    "tp2 dp2": (Layout(tp=2), 4, 1, 1),
}
"""Layout, ranks, micro-batch size (or packed into rows), tokens whose logits are made at once."""


def make_batch() -> Any:
    from megatron_longact.rl.batches.rollout_batch import RolloutBatch

    generator = torch.Generator().manual_seed(5)

    def log_probs() -> torch.Tensor:
        return -4 - 0.3 * torch.rand(N, 6, generator=generator)

    return RolloutBatch(
        step=0,
        prompts=[tuple(torch.randint(64, (8 + 3 * (i % 3),), generator=generator).tolist()) for i in range(N)],
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


def step(policy_loss: str, aggregation: str, micro_batch_size: Any, chunk_size: int) -> dict[str, Any]:
    """One forward and backward of a whole step: gradients of the whole model, the reported means, what was selected."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
    from megatron_longact.rl.objectives.objective import Objective
    from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig
    from megatron_longact.rl.objectives.token_selection import TokenSelector
    from tests.models import ModelSpec, _named_shards, build

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    config = grpo_config(
        policy_loss=policy_loss,
        **({"pack_sequences": True} if micro_batch_size == "packed" else {"micro_batch_size": micro_batch_size}),
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
    built = build(ModelSpec(layers=2))
    batch = make_batch()
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    layout = BatchLayout(config, EOD, 16, dp_rank=dp_rank, dp_size=dp_size, pp_size=pgs.pp.size())
    [plan] = layout.plan(batch)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    scorer = ResponseScorer(temperature=0.8, vocab_size=64, tp_group=tp_group, chunk_size=chunk_size)
    objective = Objective(config, scorer, None, dp_size=dp_size)
    selector = TokenSelector(config, TrainerLogProbs(built.chunks, scorer, layout, pg_collection=pgs))
    selected = selector.select(batch, plan, update=1)
    built.chunks[0].zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=objective.forward_step(batch.response_mask, num_microbatches=len(plan.micro_batches)),
        data_iterator=iter([layout.micro_batch(batch, part, selected=selected) for part in plan.micro_batches]),
        model=built.chunks[0],
        num_microbatches=len(plan.micro_batches),
        seq_length=SEQ_LENGTH,
        micro_batch_size=layout.micro_batch_size,
        forward_only=False,
    )
    gradients = {}
    for name, parameter, shard in _named_shards(built.chunks[0].module):
        parts = [torch.empty_like(parameter.main_grad) for _ in range(shard.size)]
        if shard.size > 1:
            dist.all_gather(parts, parameter.main_grad, group=parallel_state.get_tensor_model_parallel_group())
        gradients[name] = torch.cat(parts, shard.dim) if shard.size > 1 else parameter.main_grad.clone()
    sums = {}
    for name in reports[0] if reports else ():
        total = torch.stack([report[name] for report in reports]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        sums[name] = float(total[0] / total[1])
    return {"gradients": gradients, "metrics": sums, "selected": selected}


@pytest.mark.parametrize(
    ("policy_loss", "aggregation"),
    [
        ("grpo", "token-mean"),
        ("gspo", "seq-mean-token-mean"),  # the ratio of a whole response
        ("kl-cov", "token-mean"),
        ("clip-cov", "token-mean"),
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_layout(policy_loss: str, aggregation: str) -> None:
    results = {
        name: ranks.run(
            step,
            layout=layout,
            world_size=world,
            policy_loss=policy_loss,
            aggregation=aggregation,
            micro_batch_size=mb,
            chunk_size=chunk,
        )
        for name, (layout, world, mb, chunk) in CASES.items()
    }
    expected = results["micro-batches of 8"][0]
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
