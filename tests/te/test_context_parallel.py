"""Context parallelism with shared prompts on Transformer Engine's modules: its own is off for that call, then on."""

import torch
from torch import Tensor

from tests import ranks
from tests.gpu.models import GPUSpec, build
from tests.ranks import Layout
from tests.test_rl_objective import EOD, grpo_config, make_batch

ATOL = 0.03
"""bf16: attention rounds its result in another order."""


def scored() -> tuple[Tensor, dict[str, Tensor], bool]:
    """Log-probs, this rank's gradients, and whether attention has its context-parallel group as before."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.megatron.planned_attention import take_plans
    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs

    pgs = ProcessGroupCollection.use_mpu_process_groups()
    model, batch = build(GPUSpec(transformer={"context_parallel_size": pgs.cp.size()})), make_batch()
    take_plans([model.chunk])
    config = grpo_config(micro_batch_size=4, shared_prompts=True)
    layout = BatchLayout.of_rank(config, pgs, pad_token=EOD, multiple_of=16)
    scorer = ResponseScorer(temperature=1.0, vocab_size=512, tp_group=pgs.tp, cp_group=pgs.cp)
    log_probs = TrainerLogProbs([model.chunk], scorer, layout, pg_collection=pgs).of_batch(batch)
    [plan] = layout.plan(batch)
    model.chunk.zero_grad_buffer()
    for part in plan.micro_batches:
        micro_batch = layout.micro_batch(batch, part)
        scorer.forward(model.chunk, micro_batch)[0][micro_batch.response_mask].sum().backward()
    groups = {layer.self_attention.core_attention.cp_group for layer in model.layers}
    gradients = {name: p.main_grad.clone() for name, p in model.chunk.named_parameters()}
    return log_probs, gradients, groups == {pgs.cp if pgs.cp.size() > 1 else None}


def test_ranks_that_share_rows_score_and_train_as_one() -> None:
    [(alone, gradients, _)] = ranks.run(scored)
    both = ranks.run(scored, layout=Layout(cp=2), world_size=2)
    for log_probs, _, as_before in both:
        torch.testing.assert_close(log_probs, alone, rtol=0, atol=ATOL)
        assert as_before
    for name, gradient in gradients.items():
        summed = both[0][1][name] + both[1][1][name]
        assert (summed - gradient).norm() <= ATOL * gradient.norm(), name
