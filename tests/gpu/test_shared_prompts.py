"""The GPU tier: prompts computed once, through Transformer Engine's own attention for sequences of different length."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.models import GPU_TIER, GPUModel, GPUSpec, build
from tests.test_rl_objective import EOD, grpo_config, make_batch

pytestmark = GPU_TIER

ATOL = 0.05
"""bf16: attention and GEMMs round in another order."""


def trainer_and_layout(model: GPUModel, *, shared: bool, **settings: Any) -> tuple[Any, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs

    pgs = ProcessGroupCollection.use_mpu_process_groups()
    scorer = ResponseScorer(temperature=1.0, vocab_size=512, tp_group=pgs.tp)
    layout = BatchLayout(grpo_config(shared_prompts=shared, **settings), EOD, 16, dp_rank=0, dp_size=1, pp_size=1)
    return TrainerLogProbs([model.chunk], scorer, layout, pg_collection=pgs), layout


def gradients(model: GPUModel, trainer: Any, layout: Any, batch: Any) -> dict[str, Tensor]:
    """Of the sum of all response log-probs."""
    [plan] = layout.plan(batch)
    model.chunk.zero_grad_buffer()
    for part in plan.micro_batches:
        micro_batch = layout.micro_batch(batch, part).cuda()
        trainer._scorer.forward(model.chunk, micro_batch)[0][micro_batch.response_mask].sum().backward()
    return {name: parameter.main_grad.clone() for name, parameter in model.chunk.named_parameters()}


def test_log_probs_and_gradients_are_those_without_sharing(record_property: Any) -> None:
    from megatron_longact.megatron.planned_attention import take_plans

    model, batch = build(GPUSpec(transformer={"apply_rope_fusion": True})), make_batch()
    take_plans([model.chunk])
    results = []
    for shared in (False, True):
        trainer, layout = trainer_and_layout(model, shared=shared, micro_batch_size=4)
        results.append((trainer.of_batch(batch), gradients(model, trainer, layout, batch)))
    (apart, wanted), (old, got) = results
    record_property("largest difference of a log-prob", float((old - apart).abs().max()))
    torch.testing.assert_close(old, apart, rtol=0, atol=ATOL)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= ATOL * gradient.norm(), name


@pytest.mark.timeout(600)
def test_a_group_of_eight_is_scored_faster(record_property: Any) -> None:
    """Prompts of 8,192 tokens, responses of 128: two groups."""
    from megatron_longact.megatron.planned_attention import take_plans

    prompt, response, group, n = 8192, 128, 8, 16
    model = build(GPUSpec(max_length=prompt + response, transformer={"num_layers": 8, "hidden_size": 1024}))
    take_plans([model.chunk])
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(512, (n // group, prompt), generator=generator).tolist()
    batch = replace(
        make_batch(),
        prompts=[tuple(prompts[i // group]) for i in range(n)],
        responses=torch.randint(512, (n, response), generator=generator),
        lengths=torch.full((n,), response),
        rollout_log_probs=torch.zeros(n, response),
        advantages=torch.zeros(n),
        old_log_probs=None,
        ref_log_probs=None,
    )
    sizes = {"global_batch_size": n, "micro_batch_size": 2, "seq_length": prompt + response}
    seconds = []
    for shared in (False, True):
        trainer, layout = trainer_and_layout(model, shared=shared, max_response_length=response, **sizes)
        for _ in range(2):  # the first time is not counted
            torch.cuda.synchronize()
            begun = time.perf_counter()
            trainer.of_batch(batch)
            gradients(model, trainer, layout, batch)
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    record_property("times as fast", round(seconds[0] / seconds[1], 2))
    assert seconds[0] > 2 * seconds[1]
