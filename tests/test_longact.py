"""What LongAct does in a step: what each option selects, when the mask changes, what it costs, what detach leaves."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_longact import LongAct, LongActConfig, metrics
from megatron_longact.selection import QK
from megatron_longact.state import LongActState, capture_due
from tests import ranks, reference
from tests.models import Built, ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import same, take_step, train, with_longact

SPEC = ModelSpec()


def one_step(**config: Any) -> dict[str, Any]:
    return ranks.run(train, spec=SPEC, config=LongActConfig(**config), steps=1)[0]


# -- every option does something ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"statistic": "rms"},
        {"statistic": "max-abs"},
        {"scope": "head"},
        {"scope": "model"},
        {"select": "low"},
        {"ratio": 0.5},
        {"statistic": "rms", "scope": "model"},
        {"statistic": "max-abs", "scope": "head", "select": "low"},
    ],
    ids=str,
)
def test_option_agrees_with_the_reference(config: dict[str, Any]) -> None:
    from tests.runs import train_naively

    run: dict[str, Any] = {"spec": SPEC, "config": LongActConfig(**config), "steps": 1, "sequences": 4}
    result = ranks.run(train, layout=Layout(tp=2), world_size=2, **run)[0]
    wanted = ranks.run(train_naively, **run)[0]
    assert same(result["masks"][0], wanted["masks"][0])
    run["config"] = LongActConfig()
    assert not same(result["masks"][0], ranks.run(train, **run)[0]["masks"][0])


def weight_norms() -> dict[int, dict[str, Tensor]]:
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    weights = full_weights(build(SPEC))
    return {
        n: reference.saliency([weights[f"decoder.layers.{n - 1}.self_attention.linear_qkv.weight"].T], rows, "rms")
        for n in (1, 2)
    }


def test_weight_norm_ranks_rows_of_the_weight() -> None:
    norms = ranks.run(weight_norms)[0]
    wanted = reference.masks_of(norms, ratio=0.3, scope="layer", hn=SPEC.kv_channels)
    run = {"layout": Layout(tp=2), "world_size": 2, "spec": SPEC, "steps": 1}
    result = ranks.run(train, **run, config=LongActConfig(select="weight-norm"))[0]
    assert same(result["masks"][0], wanted)


def test_random_is_alike_on_all_layouts_and_new_at_each_refresh() -> None:
    config = LongActConfig(select="random")
    one = ranks.run(train, spec=SPEC, config=config)[0]["masks"]
    four = [r["masks"] for r in ranks.run(train, spec=SPEC, config=config, layout=Layout(tp=2), world_size=4)]
    assert all(same(mask, other[i]) for other in four for i, mask in enumerate(one))
    assert not same(one[0], one[1])
    assert not same(one[0], one_step(select="random", seed=7)["masks"][0])


def norm_outputs() -> dict[int, dict[str, Tensor]]:
    """Mean |activation| after q/k-layernorm, naively."""
    built = build(SPEC)
    outputs: dict[tuple[int, str], list[Tensor]] = {}
    for name, module in built.chunks[0].named_modules():
        for part in ("q", "k"):
            if name.endswith(f"{part}_layernorm"):
                layer = int(name.split("layers.")[1].split(".")[0]) + 1
                keep = outputs.setdefault((layer, part), [])
                module.register_forward_hook(lambda m, a, out, keep=keep: keep.append(out.detach().flatten(0, 1)))
    train_step(built, random_tokens(2, 32, seed=0), step=False)
    mean = {key: torch.cat(parts).double().abs().mean(0).flatten() for key, parts in outputs.items()}
    return {n: {"q": mean[n, "q"], "k": mean[n, "k"]} for n in (1, 2)}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tap_norm_reads_after_the_layernorm(tp: int) -> None:
    wanted = ranks.run(norm_outputs)[0]
    run = {"layout": Layout(tp=tp), "world_size": max(tp, 2), "spec": SPEC, "steps": 1}
    result = ranks.run(train, **run, config=LongActConfig(tap="norm"))[0]
    for layer, parts in wanted.items():
        for part, scores in parts.items():
            torch.testing.assert_close(result["saliency"][0][layer][part].double(), scores, rtol=2e-5, atol=0)
    assert same(result["masks"][0], reference.masks_of(wanted, ratio=0.3, scope="layer", hn=SPEC.kv_channels))
    assert not same(result["masks"][0], one_step()["masks"][0])


@pytest.mark.parametrize(("targets", "dense"), [("q", "k"), ("k", "q")])
def test_targets_leave_the_other_projection_dense(targets: str, dense: str) -> None:
    result = one_step(targets=targets)
    assert result["metrics"][0][f"longact/active_fraction_{dense}"] == 1.0
    assert result["metrics"][0][f"longact/active_fraction_{targets}"] == pytest.approx(0.3, abs=0.02)
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    moved = (result["weights"][0][name] != result["start"][name]).any(1)
    of = {part: moved[[i for i, (p, _) in enumerate(rows) if p == part]] for part in ("q", "k", "v")}
    assert of[dense].all()
    assert of["v"].all()
    assert int(of[targets].sum()) == round(0.3 * len(of[targets]))


def test_refresh_interval() -> None:
    def masks(interval: int) -> list[Any]:
        return ranks.run(train, spec=SPEC, config=LongActConfig(refresh_interval=interval), steps=5)[0]["masks"]

    each, second, never = masks(1), masks(2), masks(0)
    assert [same(each[i], each[i + 1]) for i in range(4)] == [False] * 4
    assert [same(second[i], second[i + 1]) for i in range(4)] == [True, False, True, False]
    assert all(same(never[0], mask) for mask in never)
    assert same(each[0], never[0])


def test_ema_smooths_from_the_first_refresh_on() -> None:
    plain = ranks.run(train, spec=SPEC, config=LongActConfig(ratio=1.0), steps=2)[0]["saliency"]
    smooth = ranks.run(train, spec=SPEC, config=LongActConfig(ratio=1.0, ema=0.75), steps=2)[0]["saliency"]
    assert same(plain[0], smooth[0])
    wanted = 0.75 * plain[0][1]["q"] + 0.25 * plain[1][1]["q"]
    torch.testing.assert_close(smooth[1][1]["q"], wanted, rtol=1e-6, atol=0)


def warmup() -> list[Any]:
    built, longact = with_longact(config=LongActConfig(warmup_steps=2))
    seen = []
    for seed in range(4):
        captured = capture_due(longact.state, longact.config)
        take_step(built, longact, seed)
        seen.append((captured, bool(longact.masks), longact.metrics()["longact/active_fraction_q"]))
    return seen


def test_warmup_trains_densely_and_reads_nothing() -> None:
    dense = ranks.run(train, spec=SPEC, config=None)[0]
    warm = ranks.run(train, spec=SPEC, config=LongActConfig(warmup_steps=2))[0]
    same_weights = [
        all(torch.equal(w, dense["weights"][i][name]) for name, w in warm["weights"][i].items()) for i in range(3)
    ]
    assert same_weights == [True, True, False]
    seen = ranks.run(warmup)[0]
    assert [s[:2] for s in seen] == [(False, False), (False, False), (True, True), (True, True)]
    assert [s[2] for s in seen[:2]] == [1.0, 1.0]


def test_smoothed_saliency_moves_in_warmup_too() -> None:
    result = ranks.run(train, spec=SPEC, config=LongActConfig(warmup_steps=2, ema=0.5), steps=3)[0]
    assert result["metrics"][2]["longact/refreshes"] == 3
    assert [bool(masks) for masks in result["masks"]] == [False, False, True]


# -- stub optimizers, and a checkpoint of other settings ---------------------------------------------


def with_a_stub(place: int | None) -> dict[str, Tensor]:
    """Weights after a step, with Megatron's stub of a rank that has nothing to optimise in the chain."""
    built = build(SPEC)
    optimizers = list(built.optimizer.chained_optimizers)
    if place is not None:
        optimizers.insert(place, FP32Optimizer(None, optimizers[0].config, lambda *_: None))
        assert optimizers[place].is_stub_optimizer
        built.optimizer = ChainedOptimizer(optimizers)
    take_step(built, LongAct.attach(built.chunks, built.optimizer, LongActConfig()))
    return full_weights(built)


@pytest.mark.parametrize("place", [0, 1])
def test_stub_optimizers_are_passed_by(place: int) -> None:
    wanted, weights = ranks.run(with_a_stub, place=None)[0], ranks.run(with_a_stub, place=place)[0]
    assert all(torch.equal(weight, weights[name]) for name, weight in wanted.items())


def resumed_with(config: dict[str, Any]) -> tuple[float, float, bool]:
    """Active fractions of Q and K after a step with other settings than the checkpoint's; whether masks stayed."""
    built, longact = with_longact()
    take_step(built, longact)
    state = longact.state_dict()
    longact.detach()
    changed = LongActConfig(**config, on_mismatch="use-flags", refresh_interval=0)
    longact = LongAct.attach(built.chunks, built.optimizer, changed)
    longact.load_state_dict(state)
    stayed = bool(longact.masks)
    take_step(built, longact, seed=1)
    found = longact.metrics()
    return found[metrics.ACTIVE_FRACTION_Q], found[metrics.ACTIVE_FRACTION_K], stayed


def test_use_flags_uses_the_flags() -> None:
    q, k, stayed = ranks.run(resumed_with, config={"targets": "q", "ratio": 0.6})[0]
    assert (round(q, 1), k, stayed) == (0.6, 1.0, False)
    assert ranks.run(resumed_with, config={"warmup_steps": 9})[0] == (1.0, 1.0, False)
    assert ranks.run(resumed_with, config={"moments": "reset"})[0][2]


@pytest.mark.parametrize(
    ("before", "after", "masks", "scores"),
    [
        ({}, {"seed": 5}, True, True),  # nothing is drawn
        ({"select": "random"}, {"select": "random", "seed": 5}, False, False),
        ({"select": "random"}, {"select": "random", "statistic": "rms"}, True, True),  # nothing is read
        ({}, {"select": "low"}, False, True),
        ({}, {"ratio": 0.2, "scope": "head"}, False, True),
        ({}, {"ema": 0.5, "refresh_interval": 7}, True, True),
        ({"select": "weight-norm"}, {}, False, False),
        ({}, {"statistic": "max-abs"}, False, False),
        ({}, {"min_context": 4096}, False, False),
        ({}, {"skip_first_tokens": 4}, False, False),
        ({}, {"tap": "norm"}, False, False),
    ],
    ids=str,
)
def test_what_is_kept_under_other_settings(
    before: dict[str, Any], after: dict[str, Any], masks: bool, scores: bool
) -> None:
    """Scores of one kind are never smoothed with those of another."""
    part = torch.ones(2, 4)
    state = LongActState(updates=3, saliency=QK(part, part), masks=QK(part > 0, part > 0))
    kept = state.to_go_on(asdict(LongActConfig(**before)), LongActConfig(**after))
    assert (kept.masks is not None, kept.saliency is not None) == (masks, scores)
    assert kept.updates == 3


# -- detach ------------------------------------------------------------------------------------------


def hooks(built: Built) -> int:
    count = 0
    for module in built.chunks[0].modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
    for optimizer in built.optimizer.chained_optimizers:
        inner = optimizer.optimizer
        count += len(inner._optimizer_step_pre_hooks) + len(inner._optimizer_step_post_hooks)
    return count


def detached(crash: bool) -> dict[str, Any]:
    built = build(SPEC)
    train_step(built, random_tokens(4, 16))  # Megatron's own first step sets attributes too
    before, finalize = hooks(built), built.config.finalize_model_grads_func
    attributes = set(vars(built.optimizer)), set(vars(built.chunks[0]))
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig())
    attached = hooks(built) > before and built.config.finalize_model_grads_func is not finalize
    twice = "attached to this optimizer already"
    with pytest.raises(ValueError, match=twice):
        LongAct.attach(built.chunks, built.optimizer, LongActConfig())

    def boom(inputs: Tensor) -> None:
        longact.set_tokens(torch.ones(1, 3).bool())

    if crash:
        with pytest.raises(ValueError, match="token mask covers"), longact:
            train_step(built, random_tokens(4, 16), before_forward=boom)
    else:
        take_step(built, longact)
        longact.detach()
        longact.detach()
    return {
        "attached": attached,
        "hooks": hooks(built) - before,
        "finalize": built.config.finalize_model_grads_func is finalize,
        "attributes": (set(vars(built.optimizer)), set(vars(built.chunks[0]))) == attributes,
        "of": LongAct.of(built.optimizer),
        "again": isinstance(LongAct.attach(built.chunks, built.optimizer, LongActConfig()).state, LongActState),
    }


@pytest.mark.parametrize("crash", [False, True])
def test_detach_leaves_nothing(crash: bool) -> None:
    result = ranks.run(detached, crash=crash)[0]
    assert result == {"attached": True, "hooks": 0, "finalize": True, "attributes": True, "of": None, "again": True}


# -- strict and grad-only ----------------------------------------------------------------------------


def test_grad_only_lets_weight_decay_and_momentum_move_frozen_rows() -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.weight"

    def moved_outside(freeze: str) -> float:
        config = LongActConfig(freeze=freeze, refresh_interval=0)
        result = ranks.run(train, spec=SPEC, config=config, steps=2)[0]
        moved = (result["weights"][-1][name] != result["start"][name]).any(1)
        rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
        return float(moved[reference.row_mask(result["masks"][0][1], rows) == 0].float().mean())

    assert moved_outside("strict") == 0.0
    assert moved_outside("grad-only") == 1.0


# -- what a profile shows, when the host waits, and what a checkpoint in FP8 needs -------------------


def profiled() -> dict[str, int]:
    built, longact = with_longact()
    take_step(built, longact)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_step(built, longact, seed=1)
    return {event.key: event.count for event in profile.key_averages()}


def test_a_profile_names_what_longact_does() -> None:
    counts = ranks.run(profiled)[0]
    # two micro-batches: the beginning and the end of each, and two layers
    assert {name: counts.get(name) for name in metrics.RANGES} == {
        metrics.CAPTURE: 2 * 4,
        metrics.REFRESH: 1,
        metrics.MASK: 1,
        metrics.FREEZE: 1,
        metrics.RESTORE: 1,
    }


class Waits(TorchFunctionMode):
    """Keeps what makes a host wait for its GPU: values of tensors that are asked for, with their dtype."""

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.seen.append((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


def waits() -> dict[str, list[tuple[str, torch.dtype]]]:
    """Of LongAct's own parts of a step, by part, and of its metrics."""
    built, longact = with_longact()
    take_step(built, longact)
    seen: dict[str, list[tuple[str, torch.dtype]]] = {}
    enter, leave = metrics.Part.__enter__, metrics.Part.__exit__
    with pytest.MonkeyPatch.context() as patch:
        mode = Waits()

        def entered(part: Any) -> None:
            enter(part)
            mode.seen = seen.setdefault(part._name, [])
            mode.__enter__()

        def left(part: Any, *exception: Any) -> None:
            mode.__exit__(*exception)
            leave(part, *exception)

        patch.setattr(metrics.Part, "__enter__", entered)
        patch.setattr(metrics.Part, "__exit__", left)
        take_step(built, longact, seed=1)
    with Waits() as asked:
        longact.metrics()
    return {**seen, "metrics": asked.seen}


def test_the_host_waits_in_a_refresh_and_when_it_is_asked_and_nowhere_else() -> None:
    """Row indices, int64, are on the host already."""
    seen = {
        part: [(name, dtype) for name, dtype in found if dtype != torch.int64]
        for part, found in ranks.run(waits)[0].items()
    }
    verdict, masks = ("tolist", torch.float32), ("cpu", torch.bool)
    rows_of_layers = ("nonzero", torch.bool)  # of masks on the host
    assert seen.pop(metrics.REFRESH) == [verdict, masks, rows_of_layers]
    assert seen.pop("metrics") == [("tolist", torch.float32)]
    assert seen == {part: [] for part in (metrics.CAPTURE, metrics.MASK, metrics.FREEZE, metrics.RESTORE)}


def weights_after_load(fp8_param_gather: bool) -> tuple[bool, bool]:
    """Whether model weights that a checkpoint got wrong are their masters' again, and the frozen ones too."""
    built, longact = with_longact(ModelSpec(dtype="bf16"), optimizer=OptimizerSpec(distributed=True))
    take_step(built, longact)
    built.optimizer.chained_optimizers[0].ddp_config.fp8_param_gather = fp8_param_gather
    weights = [p for p in built.chunks[0].parameters() if p.dtype == torch.bfloat16]
    right = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.25)
    longact.load_state_dict(longact.state_dict())
    derived = all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))
    return derived, longact.state.updates == 1


@pytest.mark.parametrize("fp8_param_gather", [True, False])
def test_weights_kept_in_fp8_are_derived_from_their_masters_on_loading(fp8_param_gather: bool) -> None:
    for derived, loaded in ranks.run(weights_after_load, fp8_param_gather=fp8_param_gather, world_size=2):
        assert derived == fp8_param_gather
        assert loaded
