"""Multi-latent attention: its layout on paper, and in every layout the same selection and update as done naively."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig
from megatron_longact.attention_layout import NO_CHANNEL, ShardedLayout
from megatron_longact.layouts import layout_from_saved
from megatron_longact.mla_layout import MLALayout
from tests import ranks, reference_mla
from tests.models import ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import cpu, frozen_rows_stay, naive_optimizer, name_all, train

SIZES = {"qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 16}
Q_LATENT = ModelSpec(mla={**SIZES, "q_lora_rank": 12})
NO_Q_LATENT = ModelSpec(qk_layernorm=False, mla={**SIZES, "q_lora_rank": None})
HF_NAMES = {
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
}
SPECS = {"q latent": Q_LATENT, "no q latent": NO_Q_LATENT}
DISTRIBUTED = OptimizerSpec(distributed=True, overlap=True)


def rows_of(spec: ModelSpec) -> reference_mla.Rows:
    assert spec.mla is not None
    return reference_mla.channels_of_rows(
        spec.heads, *(SIZES[name] for name in list(SIZES)[:3]), spec.mla["q_lora_rank"], SIZES["kv_lora_rank"]
    )


def layout_of(spec: ModelSpec) -> MLALayout:
    assert spec.mla is not None
    return MLALayout(spec.heads, **spec.mla)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_row_is_the_channel_that_the_paper_says(spec: ModelSpec) -> None:
    layout, rows = layout_of(spec), rows_of(spec)
    first_k = spec.heads * 12
    first = {"q": 0, "k": first_k, "k_rope": first_k + spec.heads * 8}
    wanted = {
        name: [first[part] + channel if part in first else NO_CHANNEL for part, channel in of]
        for name, of in rows.items()
    }
    assert {each.name: each.channels.tolist() for each in layout.projections} == wanted
    every = torch.cat([each.channels for each in layout.projections])
    assert sorted(every[every != NO_CHANNEL].tolist()) == list(range(layout.num_q_channels + layout.num_k_channels))
    assert layout_from_saved(layout.saved()) == layout


@pytest.mark.parametrize(
    "whole", [frozenset(), frozenset({"linear_kv_down_proj"}), "fused", "fused and whole"], ids=str
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_hold_every_channel(tp: int, whole: Any) -> None:
    fused = isinstance(whole, str)
    layout = replace(layout_of(Q_LATENT), fused_down_projection=fused)
    names = frozenset({"linear_qkv_down_proj"} if whole == "fused and whole" else () if fused else whole)
    sharded = ShardedLayout(layout, tp, names)
    every = torch.cat([sharded.channels(rank) for rank in range(tp)])
    assert every[sharded.places()].tolist() == list(range(layout.num_q_channels + layout.num_k_channels))
    assert len(every) == tp * sharded.num_rows
    if fused and not names:  # as `FusedMLASelfAttention` splits its output: the latents' rows of each rank apart
        own = sharded.channels(0)[sharded.columns["linear_qkv_down_proj"]]
        assert len(own) == (12 + 16 + 4) // tp
        assert own[: 12 // tp].eq(NO_CHANNEL).all()


def whole_saliency(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """K's channels as LongAct has them: those of the heads, then those that all share."""
    return {"q": parts["q"], "k": torch.cat([parts["k"], parts["k_rope"]])}


def train_naively(*, spec: ModelSpec, config: LongActConfig, steps: int = 3) -> dict[str, Any]:
    """As `runs.train_naively`."""
    built = build(spec, OptimizerSpec())
    model, rows, inner = built.chunks[0].module, rows_of(spec), naive_optimizer(OptimizerSpec())
    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(weight: str) -> Any:
        return lambda module, args, output: outputs.setdefault(weight, []).append(output[0].detach().flatten(0, 1))

    numbers = range(1, spec.layers + 1)
    weights = {n: {name: f"decoder.layers.{n - 1}.self_attention.{name}.weight" for name in rows} for n in numbers}
    for weight in (weight for of in weights.values() for weight in of.values()):
        model.get_submodule(weight.removesuffix(".weight")).register_forward_hook(keep(weight))
    parameters = dict(model.named_parameters())
    result: dict[str, Any] = {"masks": [], "saliency": [], "weights": [], "norms": []}
    for step in range(steps):
        outputs.clear()
        train_step(built, random_tokens(2, 32, vocab=spec.vocab, seed=step), step=False)
        grads = {name: p.main_grad.clone() for name, p in parameters.items()}
        seen = {n: {name: outputs[weight] for name, weight in of.items()} for n, of in weights.items()}
        if config.select == "gradient":
            seen = {n: {name: [grads[weight].T] for name, weight in of.items()} for n, of in weights.items()}
        scores = {n: reference_mla.saliency(of, rows, config) for n, of in seen.items()}
        masks = reference_mla.masks_of(scores, config, widths={"q": 12, "k": 8, "k_rope": 4})
        frozen = {
            weights[n][name]: mask == 0
            for n in numbers
            for name, mask in reference_mla.row_masks(masks[n], rows).items()
        }
        before = {name: p.detach().clone() for name, p in parameters.items()}
        values = {name: p.data for name, p in parameters.items()}
        for name, where in frozen.items():
            grads[name][where] = 0
        norm = inner.step(values, grads, decays=lambda name: parameters[name].dim() > 1)
        for name, where in frozen.items():
            values[name][where] = before[name][where]
        result["masks"].append({n: whole_saliency(of) for n, of in masks.items()})
        result["saliency"].append({n: whole_saliency(of) for n, of in scores.items()})
        result["norms"].append(norm)
        result["frozen"] = frozen
        result["weights"].append({name: value.clone() for name, value in values.items()})
    return result


WHOLE = replace(Q_LATENT, whole_down_projections=True, config={"sequence_parallel": True})
"""As with Transformer Engine: down-projections on every rank, each over its part of the sequence."""

CASES: dict[str, tuple[ModelSpec, Layout, int, OptimizerSpec, LongActConfig]] = {
    "tp1": (Q_LATENT, Layout(), 1, OptimizerSpec(), LongActConfig()),
    "no q latent, dp2 distributed": (NO_Q_LATENT, Layout(), 2, DISTRIBUTED, LongActConfig()),
    "pp2": (Q_LATENT, Layout(pp=2), 2, OptimizerSpec(), LongActConfig()),
    "tp2, whole down-projections": (WHOLE, Layout(tp=2), 2, DISTRIBUTED, LongActConfig()),
    "tp2, whole down-projections, max": (WHOLE, Layout(tp=2), 2, DISTRIBUTED, LongActConfig(statistic="max-abs")),
    "tp2, whole down-projections, gradient": (WHOLE, Layout(tp=2), 2, DISTRIBUTED, LongActConfig(select="gradient")),
    "tp4, whole down-projections": (WHOLE, Layout(tp=4), 4, OptimizerSpec(), LongActConfig()),
    "no q latent, tp2 dp2, whole down-projections": (
        replace(WHOLE, mla=NO_Q_LATENT.mla, qk_layernorm=False),
        Layout(tp=2),
        4,
        DISTRIBUTED,
        LongActConfig(),
    ),
    "tp4": (Q_LATENT, Layout(tp=4), 4, OptimizerSpec(), LongActConfig()),
    "by head, q": (Q_LATENT, Layout(), 1, OptimizerSpec(), LongActConfig(scope="head", targets="q")),
    "over the model, k": (Q_LATENT, Layout(), 1, OptimizerSpec(), LongActConfig(scope="model", targets="k")),
}


@cache
def naive(q_latent: bool, config: LongActConfig) -> dict[str, Any]:
    return ranks.run(train_naively, spec=Q_LATENT if q_latent else NO_Q_LATENT, config=config)[0]


@cache
def trained(case: str) -> list[dict[str, Any]]:
    spec, layout, world_size, optimizer, config = CASES[case]
    # Megatron's cut down-projections give the RoPE rows that all heads share the gradient of a rank's own heads alone
    exact = layout.tp == 1 or spec.whole_down_projections
    run = {"layout": layout, "world_size": world_size, "steps": 3 if exact else 1}
    return ranks.run(train, **run, spec=spec, optimizer=optimizer, config=config)


@pytest.mark.parametrize("case", CASES)
def test_layout_selects_and_updates_as_the_reference(case: str) -> None:
    spec, *_, config = CASES[case]
    assert spec.mla is not None
    wanted, results = naive(spec.mla["q_lora_rank"] is not None, config), trained(case)
    for result in results:  # alike on every rank, also where all hold a weight
        for step, masks in enumerate(wanted["masks"][: len(result["masks"])]):
            for layer, part in ((layer, part) for layer in masks for part in "qk"):
                scores = result["saliency"][step][layer][part].double()
                rtol = 1e-3 if config.select == "gradient" else 2e-5
                torch.testing.assert_close(scores, wanted["saliency"][step][layer][part], rtol=rtol, atol=0)
                assert torch.equal(result["masks"][step][layer][part], masks[layer][part])
    result = results[0]
    if len(result["masks"]) < len(wanted["masks"]):
        return
    assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    for name, weight in wanted["weights"][-1].items():
        moved = float((weight - result["start"][name]).abs().max())
        torch.testing.assert_close(result["weights"][-1][name], weight, rtol=0, atol=max(1e-3 * moved, 1e-7))
    for name, frozen in wanted["frozen"].items():
        moves = (result["weights"][-1][name] != result["weights"][-2][name]).any(1)
        assert torch.equal(moves, ~frozen), name


def test_share_of_the_gradient_counts_whole_weights_once() -> None:
    name = "longact/masked_grad_norm_share"
    shares = [[step[name] for step in trained(case)[0]["metrics"]] for case in ("tp1", "tp2, whole down-projections")]
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


@pytest.mark.parametrize(("layout", "spec"), [(Layout(pp=2), Q_LATENT), (Layout(tp=2), WHOLE)], ids=["pp2", "tp2"])
def test_a_checkpoint_goes_on_at_another_layout(layout: Layout, spec: ModelSpec) -> None:
    before, rows = trained("tp4, whole down-projections")[0], rows_of(spec)
    config = LongActConfig(
        refresh_interval=2, on_mismatch="use-flags"
    )  # so that nothing is selected at the fourth step
    for result in ranks.run(resume, layout=layout, world_size=2, spec=spec, config=config, state=before["state"]):
        for layer, mask in before["masks"][-1].items():
            for part in "qk":
                assert torch.equal(result["masks"][layer][part], mask[part])
                assert torch.equal(result["saliency"][layer][part], before["saliency"][-1][layer][part])
            own, shared = mask["k"].split([32, 4])
            for name, moves in reference_mla.row_masks({"q": mask["q"], "k": own, "k_rope": shared}, rows).items():
                moved = result["moved"][f"decoder.layers.{layer - 1}.self_attention.{name}.weight"]
                assert torch.equal(moved, moves.bool())
                named = result["named"][f"model.layers.{layer - 1}.self_attn.{HF_NAMES[name]}.weight"]
                assert named.tolist() == (~moved).nonzero().flatten().tolist()


def resume(spec: ModelSpec, config: LongActConfig, state: dict[str, Any]) -> dict[str, Any]:
    """A step that selects nothing anew, behind the state of a run at another layout."""
    built = build(spec, DISTRIBUTED)
    with LongAct.attach(built.chunks, built.optimizer, config) as longact:
        longact.load_state_dict(state)
        start = full_weights(built)
        assert train_step(built, random_tokens(2, 32), before_forward=name_all(longact))[0]
        moved = {name: (weight != start[name]).any(-1) for name, weight in full_weights(built).items()}
        named = longact.frozen_rows_by_hf_name(since=state["updates"])
        return {"masks": cpu(longact.masks), "saliency": cpu(longact.saliency), "moved": moved, "named": named}


@pytest.mark.parametrize("spec", [WHOLE, NO_Q_LATENT], ids=["whole down-projections", "no q latent"])
def test_frozen_rows_are_bit_identical(spec: ModelSpec) -> None:
    # a large step, so that each active row moves by more than half a bf16 unit
    optimizer = replace(DISTRIBUTED, lr=0.05, eps=1e-8)
    settings = {"spec": replace(spec, dtype="bf16"), "optimizer": optimizer, "config": LongActConfig()}
    counts = ranks.run(frozen_rows_stay, layout=Layout(tp=2), world_size=4, **settings)
    for count in counts:
        assert count["frozen changed"] == count["model frozen changed"] == count["active same"] == 0
        assert count["active"] > 0
    assert sum(count["frozen"] for count in counts) > 0


def test_a_mask_that_freezes_nothing_changes_no_bit() -> None:
    settings = {"layout": Layout(tp=2), "world_size": 2, "spec": WHOLE, "optimizer": DISTRIBUTED, "steps": 2}
    dense, whole = (ranks.run(train, **settings, config=c)[0] for c in (None, LongActConfig(ratio=1.0)))
    assert dense["norms"] == whole["norms"]
    for name, weight in dense["weights"][-1].items():
        assert torch.equal(weight, whole["weights"][-1][name]), name
