"""Shared prompts on Transformer Engine's modules: one variable-length call, in which keys and values are gathered."""

import inspect
from typing import Any

import torch
from torch import Tensor

from tests import ranks
from tests.gpu.models import GPUSpec, build
from tests.test_rl_objective import EOD, grpo_config, make_batch

ATOL = 0.03
"""bf16: attention rounds its result in another order."""


def test_transformer_engine_takes_what_the_hook_says() -> None:
    import transformer_engine.pytorch as te

    said = ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "attn_mask_type")
    signature = inspect.signature(te.DotProductAttention.forward)
    signature.bind(None, None, None, None, None, **dict.fromkeys(said))
    assert "padding_causal_bottom_right" in str(inspect.getdoc(te.DotProductAttention.forward))


def log_probs_and_gradients() -> list[dict[str, Any]]:
    """Of one model, without sharing and with it."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.megatron.planned_attention import take_plans
    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs

    model, batch = build(GPUSpec()), make_batch()
    take_plans([model.chunk])
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    scorer = ResponseScorer(temperature=1.0, vocab_size=512, tp_group=pgs.tp)
    attention, results = model.layers[0].self_attention.core_attention, []
    calls: list[Any] = []
    attention.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for shared in (False, True):
        config = grpo_config(micro_batch_size=4, shared_prompts=shared)
        layout = BatchLayout(config, EOD, 16, dp_rank=0, dp_size=1, pp_size=1)
        old = TrainerLogProbs([model.chunk], scorer, layout, pg_collection=pgs).of_batch(batch)
        [plan] = layout.plan(batch)
        model.chunk.zero_grad_buffer()
        for part in plan.micro_batches:
            micro_batch = layout.micro_batch(batch, part)
            scorer.forward(model.chunk, micro_batch)[0][micro_batch.response_mask].sum().backward()
        gradients = {name: p.main_grad.clone() for name, p in model.chunk.named_parameters()}
        results.append({"old": old, "gradients": gradients})
    (query, key, *_), kwargs = calls[-1]
    results.append({"tokens": (len(query), len(key)), "mask": kwargs["attn_mask_type"].name})
    return results


def test_log_probs_and_gradients_are_those_without_sharing() -> None:
    [(apart, shared, seen)] = ranks.run(log_probs_and_gradients)
    torch.testing.assert_close(shared["old"], apart["old"], rtol=0, atol=ATOL)
    for name, gradient in apart["gradients"].items():
        difference: Tensor = (shared["gradients"][name] - gradient).norm()
        assert difference <= ATOL * gradient.norm(), name
    assert seen["mask"] == "padding_causal_bottom_right"
    queries, keys = seen["tokens"]
    assert queries < keys  # the prompts once more for each response
