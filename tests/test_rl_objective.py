"""The objective on Megatron's schedule: one loss and one gradient, whatever the micro-batches and the layout."""

from typing import Any

import pytest
import torch

from tests import ranks
from tests.ranks import Layout

RELATIVE = 2e-5
"""fp32; sums over tokens and shards are rounded in another order."""

EOD, SEQ_LENGTH, N = 5, 32, 8
CASES = {
    "micro-batches of 8": (Layout(), 1, 8),
    "micro-batches of 1": (Layout(), 1, 1),
    "tp2": (Layout(tp=2), 2, 4),
    "pp2": (Layout(pp=2), 2, 2),
    "dp2": (Layout(), 2, 2),
    "tp2 dp2": (Layout(tp=2), 4, 1),
}


def make_batch() -> Any:
    from megatron_longact.rl.batches import RolloutBatch

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


def step(aggregation: str, micro_batch_size: int) -> dict[str, Any]:
    """One forward and backward of a whole step: gradients of the whole model, and the reported means."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_longact.rl.arguments import GRPOConfig
    from megatron_longact.rl.batches import make_micro_batch, plan_steps
    from megatron_longact.rl.log_probs import ResponseScorer
    from megatron_longact.rl.objective import Objective
    from megatron_longact.rl.policy_loss import PolicyLossConfig
    from megatron_longact.rl.sampling import Sampling
    from tests.models import ModelSpec, _named_shards, build

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    config = GRPOConfig(
        prompts_per_step=N,
        group_size=1,
        epochs=1,
        global_batch_size=N,
        micro_batch_size=micro_batch_size,
        seq_length=SEQ_LENGTH,
        sampling=Sampling(max_response_length=6, temperature=0.8),
        policy_loss="grpo",
        loss=PolicyLossConfig(clip_low=0.1, clip_high=0.2, aggregation=aggregation),
        kl_beta=0.1,
        kl_estimator="k3",
        normalize_advantages=True,
        tasks=(),
        context_lengths=(8,),
        heldout_context_lengths=(8,),
        heldout_prompts=1,
        seed=1,
    )
    built = build(ModelSpec(layers=2))
    batch = make_batch()
    [plan] = plan_steps(
        batch,
        seed=1,
        epochs=1,
        global_batch_size=N,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    scorer = ResponseScorer(temperature=0.8, vocab_size=64, tp_group=parallel_state.get_tensor_model_parallel_group())
    objective = Objective(config, scorer, None, dp_size=dp_size)
    built.chunks[0].zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=objective.forward_step(batch.response_mask, num_microbatches=len(plan.micro_batches)),
        data_iterator=iter(
            [
                make_micro_batch(batch, mb, pad_token=EOD, multiple_of=16, fixed_length=SEQ_LENGTH)
                for mb in plan.micro_batches
            ]
        ),
        model=built.chunks[0],
        num_microbatches=len(plan.micro_batches),
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
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
    return {"gradients": gradients, "metrics": sums}


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_loss_and_gradient_do_not_depend_on_the_layout(aggregation: str) -> None:
    results = {
        name: ranks.run(step, layout=layout, world_size=world, aggregation=aggregation, micro_batch_size=mb)
        for name, (layout, world, mb) in CASES.items()
    }
    expected = results["micro-batches of 8"][0]
    assert expected["metrics"]["clip_fraction"] > 0
    assert expected["metrics"]["kl"] > 0
    for name, by_rank in results.items():
        gradients = {k: v for result in by_rank for k, v in result["gradients"].items()}
        assert gradients.keys() == expected["gradients"].keys()
        for key, gradient in gradients.items():
            scale = expected["gradients"][key].abs().max()
            assert scale > 0, key
            assert (gradient - expected["gradients"][key]).abs().max() <= RELATIVE * scale, (name, key)
        for result in by_rank:
            if result["metrics"]:
                assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-4), name
