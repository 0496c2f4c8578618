"""Rows that are named as frozen, held against a real difference of exported weights, over masks that move."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion.fused import hf_parts
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.mapping import entries_of
from megatron_longact.optimizer_shards import freezes_exactly
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import name_all

UPDATES = 4
SPEC = ModelSpec(qk_layernorm=False, config={"add_qkv_bias": True}, kv_channels=8)
HF = {
    "model_type": "qwen2",
    "num_hidden_layers": SPEC.layers,
    "hidden_size": SPEC.hidden,
    "intermediate_size": 2 * SPEC.hidden,
    "num_attention_heads": SPEC.heads,
    "num_key_value_heads": SPEC.groups,
    "vocab_size": SPEC.vocab,
    "max_position_embeddings": SPEC.max_length,
    "rms_norm_eps": 1e-5,
}


def exported(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Q, K and V of all layers under their Hugging Face names, by the converter's own table."""
    model = model_from_config(HF, where="HF")
    weights = {name[name.index("decoder.") :]: value for name, value in weights.items() if "linear_qkv" in name}
    tensors = {}
    for entry in entries_of(model):
        if entry.layout == "qkv":
            name = entry.key.replace("decoder.layers.", f"decoder.layers.{entry.index[0]}.")
            tensors |= {hf.name: part.clone() for hf, part in hf_parts(entry, model, weights[name])}
    return tensors


def train(*, freeze: str) -> dict[str, Any]:
    """Four updates, the first dense, and what is named before and after a resume; an older checkpoint's answer too."""
    built = build(SPEC, OptimizerSpec(distributed=True))
    config = LongActConfig(ratio=0.25, select="random", warmup_steps=1, freeze=freeze)  # type: ignore[arg-type]
    longact = LongAct.attach(built.chunks, built.optimizer, config)
    named = [longact.frozen_rows_by_hf_name()]
    weights = [exported(full_weights(built))]
    for step in range(UPDATES):
        assert train_step(built, random_tokens(2, 32, seed=step), before_forward=name_all(longact))[0]
        weights.append(exported(full_weights(built)))
    named += [longact.frozen_rows_by_hf_name(since=since) for since in range(UPDATES + 1)]
    saved = longact.state_dict()
    longact.load_state_dict(saved)
    resumed = [longact.frozen_rows_by_hf_name(since=since) for since in range(UPDATES + 1)]
    longact.load_state_dict({name: value for name, value in saved.items() if name != "history"})
    older = [longact.frozen_rows_by_hf_name(since=since) for since in (UPDATES - 1, UPDATES)]
    assert train_step(built, random_tokens(2, 32, seed=9), before_forward=name_all(longact))[0]
    older += [longact.frozen_rows_by_hf_name(since=since) for since in (UPDATES - 1, UPDATES)]
    with pytest.raises(ValueError, match="since is 6; updates 0 to 5 have been"):
        longact.frozen_rows_by_hf_name(since=UPDATES + 2)
    return {"named": named, "weights": weights, "resumed": resumed, "older": older}


def unchanged(before: Tensor, after: Tensor) -> list[int]:
    rows = (before == after).view(len(before), -1).all(1)
    return [int(row) for row in rows.nonzero()]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_named_rows_are_those_that_a_diff_of_the_exports_finds_unchanged(layout: Layout) -> None:
    results = ranks.run(train, layout=layout, world_size=2, freeze="strict")
    weights = results[0]["weights"]
    names = {n for n in weights[0] if "v_proj" not in n}
    assert len(names) == 2 * 2 * 2  # two layers; Q and K; weight and bias
    for result in results:
        at_start, *named = result["named"]
        assert {name: rows.tolist() for name, rows in at_start.items()} == {
            n: [*range(len(weights[0][n]))] for n in names
        }
        for since, rows in enumerate(named):
            found = {name: unchanged(weights[since][name], weights[-1][name]) for name in names}
            assert {name: row.tolist() for name, row in rows.items()} == found
        assert all(not len(rows) for rows in named[0].values())  # the first update was dense
        counts = [sum(map(len, rows.values())) for rows in named]
        assert counts == sorted(counts)
        assert len(set(counts)) == UPDATES + 1  # masks moved
        for resumed, rows in zip(result["resumed"], named, strict=True):
            assert all(torch.equal(resumed[name], rows[name]) for name in names)
        unknown, since_then, still_unknown, by_now = (sum(map(len, rows.values())) for rows in result["older"])
        assert unknown == still_unknown == 0
        assert since_then == counts[-1] > by_now > 0


def test_nothing_is_named_that_moves_without_a_gradient() -> None:
    [result, _] = ranks.run(train, world_size=2, freeze="grad-only")
    assert all(not len(rows) for named in result["named"][1:-1] for rows in named.values())
    assert all(len(rows) for rows in result["named"][-1].values())  # since now


def test_weights_in_fp8_are_not_frozen_to_the_bit() -> None:
    class Optimizer:
        ddp_config = type("Config", (), {"fp8_param_gather": True})

    assert not freezes_exactly(Optimizer(), LongActConfig())
    Optimizer.ddp_config.fp8_param_gather = False
    assert freezes_exactly(Optimizer(), LongActConfig())
    assert not freezes_exactly(Optimizer(), LongActConfig(freeze="grad-only"))
