"""Multi-latent attention in Transformer Engine's real layers: whole down-projections, or one fused and cut one.

Torch stands in for the kernels (`tests.te.torch_kernels`). Held against the same model on one rank.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build, full_value, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import cpu, name_all

Q, KV, DN, DR, DV = 32, 32, 16, 16, 16
SIZES = {"q_lora_rank": Q, "kv_lora_rank": KV, "qk_head_dim": DN, "qk_pos_emb_head_dim": DR, "v_head_dim": DV}
UNFUSED = ModelSpec(
    mla=SIZES,
    hidden=64,
    transformer_engine=True,
    config={"transformer_impl": "transformer_engine", "deterministic_mode": False},
)
FUSED = replace(UNFUSED, mla={**SIZES, "mla_down_proj_fusion": True})


def selected(spec: ModelSpec) -> dict[str, Any]:
    """Three steps: saliency and masks of each, and what this rank holds."""
    built = build(spec, OptimizerSpec(distributed=True))
    attentions = [layer.self_attention for layer in built.chunks[0].module.decoder.layers]
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig())
    tp = longact.model.groups.tp
    for number, attention in enumerate(attentions if hasattr(attentions[0], "linear_qkv_down_proj") else ()):
        name = f"decoder.layers.{number}.self_attention.linear_qkv_down_proj.weight"
        whole = full_value(name, (Q + KV + DR, spec.hidden)).split([Q, KV + DR])  # Megatron cuts each by itself
        part = torch.cat([rows.chunk(tp.size())[tp.rank()] for rows in whole])
        attention.linear_qkv_down_proj.weight.data.copy_(part)
    built.optimizer.reload_model_params()
    steps = []
    for step in range(3):
        before = {id(p): p.detach().clone() for layer in longact.model.layers for p in layer.parameters}
        assert train_step(built, random_tokens(2, 32, seed=step), before_forward=name_all(longact))[0]
        for chunk in built.chunks:
            chunk.start_param_sync(force_sync=True)
        for parameter, rows in longact.step.frozen.items():
            moved = (parameter != before[id(parameter)]).any(1)
            assert not moved[rows.host].any()
            assert moved.sum() == len(moved) - len(rows)
        steps.append({"masks": cpu(longact.masks), "saliency": cpu(longact.saliency)})
    kinds = {name: type(getattr(attentions[0], name)).__name__ for name in longact.model.layers[0].names}
    return {"steps": steps, "kinds": kinds, "whole": longact.model.whole}


@cache
def one_rank(fused: bool) -> dict[str, Any]:
    return ranks.run(selected, spec=FUSED if fused else UNFUSED)[0]


@pytest.mark.parametrize("fused", [False, True])
def test_tensor_parallel_ranks_select_as_one(fused: bool) -> None:
    spec = replace(FUSED if fused else UNFUSED)
    spec = replace(spec, config={**spec.config, "sequence_parallel": True})
    wanted = one_rank(fused)
    for result in ranks.run(selected, layout=Layout(tp=2), world_size=2, spec=spec):
        down = "linear_qkv_down_proj" if fused else "linear_kv_down_proj"
        assert result["kinds"][down] == ("TELayerNormColumnParallelLinear" if fused else "TELinear")
        assert result["kinds"]["linear_kv_up_proj"] == "TELayerNormColumnParallelLinear"
        assert result["whole"] == (frozenset() if fused else {down})
        # a fused and cut down-projection gives the shared RoPE rows the gradient of a rank's own heads alone
        for ours, theirs in list(zip(result["steps"], wanted["steps"], strict=True))[: 1 if fused else 3]:
            for layer, masks in theirs["masks"].items():
                for part, mask in masks.items():
                    torch.testing.assert_close(
                        ours["saliency"][layer][part], theirs["saliency"][layer][part], rtol=2e-5, atol=0
                    )
                    assert torch.equal(ours["masks"][layer][part], mask)
