"""What LongAct does in a step: which forwards and tokens count, when the mask changes, what a skipped step leaves."""

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_longact import LongAct, LongActConfig, metrics
from megatron_longact.state import LongActState, capture_due, selects_otherwise
from tests import ranks, reference
from tests.models import Built, ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import cpu, name_all, train

SPEC = ModelSpec()


def both(spec: ModelSpec = SPEC, config: LongActConfig | None = None, optimizer: OptimizerSpec | None = None) -> Any:
    built = build(spec, optimizer)
    return built, LongAct.attach(built.chunks, built.optimizer, config or LongActConfig())


def step(built: Built, longact: LongAct, seed: int = 0, **kwargs: Any) -> bool:
    kwargs.setdefault("before_forward", name_all(longact))
    return train_step(built, random_tokens(2, 32, seed=seed), **kwargs)[0]


def one_step(**config: Any) -> dict[str, Any]:
    return ranks.run(train, spec=SPEC, config=LongActConfig(**config), steps=1)[0]


def same(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][p], b[n][p]) for n in a for p in ("q", "k"))


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
    built, longact = both(config=LongActConfig(warmup_steps=2))
    seen = []
    for seed in range(4):
        captured = capture_due(longact.state, longact.config)
        step(built, longact, seed)
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


def counted_saliency(length_rule: dict[str, int], lengths: list[int], micro_batch_size: int) -> dict[str, Any]:
    """Padded micro-batches of sequences of given lengths; the padding is garbage that moves activations."""
    built, longact = both(config=LongActConfig(**length_rule))
    tokens = random_tokens(len(lengths), 16, seed=3)
    real = (torch.arange(16)[None] < torch.tensor(lengths)[:, None]).split(micro_batch_size)
    masks = iter(real[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()])
    train_step(
        built,
        tokens,
        micro_batch_size=micro_batch_size,
        before_forward=lambda inputs: longact.set_tokens(next(masks)),
    )
    return {"saliency": cpu(longact.saliency), "rejected": longact.state.rejected}


def naive_counted(keep: list[list[bool]]) -> dict[int, dict[str, Tensor]]:
    built = build(SPEC)
    log = reference.ActivationLog(built.chunks[0])
    train_step(built, random_tokens(len(keep), 16, seed=3), step=False)
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    return {
        n: reference.saliency([a[torch.tensor(k)] for a, k in zip(out, keep, strict=True)], rows, "mean-abs")
        for n, out in log.outputs.items()
    }


@pytest.mark.parametrize(
    "rule", [{}, {"min_context": 8}, {"skip_first_tokens": 3}, {"min_context": 8, "skip_first_tokens": 9}]
)
@pytest.mark.parametrize(
    ("lengths", "micro_batch_size", "layout"),
    [
        ([16, 5, 11, 8], 1, Layout(tp=2)),
        ([16, 5, 11, 8], 4, Layout(tp=2)),
        ([16, 0, 11, 0], 1, Layout()),
        ([16, 5, 11, 0, 0, 8, 0, 0], 2, Layout(pp=2)),
    ],
    ids=["one each", "lengths mixed in a micro-batch", "a rank with empty micro-batches", "some micro-batches empty"],
)
def test_only_tokens_that_count_are_counted(
    rule: dict[str, int], lengths: list[int], micro_batch_size: int, layout: Layout
) -> None:
    keep = [
        [n >= rule.get("min_context", 0) and rule.get("skip_first_tokens", 0) <= i < n for i in range(16)]
        for n in lengths
    ]
    wanted = ranks.run(naive_counted, keep=keep)[0]
    run = {"length_rule": rule, "lengths": lengths, "micro_batch_size": micro_batch_size}
    for result in ranks.run(counted_saliency, **run, layout=layout, world_size=2):
        for layer, parts in wanted.items():
            for part, scores in parts.items():
                torch.testing.assert_close(result["saliency"][layer][part].double(), scores, rtol=2e-5, atol=0)


# -- which forwards count ----------------------------------------------------------------------------


def forwards() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case in ("plain", "no-grad forwards", "pass repeated", "micro-batches of two"):
        built, longact = both()
        kwargs: dict[str, Any] = {"micro_batch_size": 2} if case == "micro-batches of two" else {}
        if case == "no-grad forwards":
            with torch.no_grad():
                inputs = random_tokens(2, 15, seed=9)
                built.chunks[0](inputs, torch.arange(16).expand(2, 16), torch.ones(1, 1, 16, 16).bool().triu(1))
        if case == "pass repeated":
            step(built, longact, step=False)
        step(built, longact, **kwargs)
        results[case] = {"saliency": cpu(longact.saliency), "masks": cpu(longact.masks)}
        longact.detach()
    return results


def test_rollouts_and_repeated_passes_do_not_count() -> None:
    results = ranks.run(forwards)[0]
    assert same(results["plain"]["saliency"], results["no-grad forwards"]["saliency"])
    assert same(results["plain"]["saliency"], results["pass repeated"]["saliency"])
    assert same(results["plain"]["masks"], results["micro-batches of two"]["masks"])


def packed_run(named: bool) -> dict[str, Any]:
    """Three sequences and padding in one row, told by packed_seq_params."""
    built, longact = both(config=LongActConfig(skip_first_tokens=2))
    bounds, padded = torch.tensor([0, 6, 14], dtype=torch.int32), torch.tensor([0, 6, 16], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=10,
        max_seqlen_kv=10,
    )
    log = reference.ActivationLog(built.chunks[0])

    def name(inputs: Tensor) -> None:
        if named:
            longact.set_tokens(torch.arange(16)[None] < 9)

    train_step(
        built,
        random_tokens(1, 16),
        forward_kwargs=lambda inputs: {"packed_seq_params": packed},
        before_forward=name,
    )
    keep = torch.tensor([2, 3, 4, 5, 8, *(() if named else (9, 10, 11, 12, 13))])
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    wanted = {n: reference.saliency([out[0][keep]], rows, "mean-abs") for n, out in log.outputs.items()}
    return {"saliency": cpu(longact.saliency), "wanted": wanted}


@pytest.mark.parametrize("named", [False, True])
def test_packed_sequences_are_counted_by_their_bounds(named: bool) -> None:
    result = ranks.run(packed_run, named=named)[0]
    for layer, parts in result["wanted"].items():
        for part, scores in parts.items():
            torch.testing.assert_close(result["saliency"][layer][part].double(), scores, rtol=2e-5, atol=0)


def packed_logits(yarn: bool) -> list[Tensor]:
    """Losses of two sequences, apart and packed into one row."""
    model = build(replace(SPEC, yarn=yarn)).chunks[0].module
    tokens = random_tokens(1, 14, seed=4)
    bounds = torch.tensor([0, 6, 14], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=8, max_seqlen_kv=8
    )
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    together = model(inputs, positions, None, labels=labels, packed_seq_params=packed)
    apart = []
    for begin, end in ((0, 6), (6, 14)):
        n = end - begin
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        apart.append(model(inputs[:, begin:end], torch.arange(n)[None], mask, labels=labels[:, begin:end]))
    return [together.detach(), torch.cat(apart, dim=1).detach()]


@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
def test_packed_sequences_do_not_see_each_other(yarn: bool) -> None:
    together, apart = ranks.run(packed_logits, yarn=yarn)[0]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def with_a_stub(place: int | None) -> dict[str, Tensor]:
    """Weights after a step, with Megatron's stub of a rank that has nothing to optimise in the chain."""
    built = build(SPEC)
    optimizers = list(built.optimizer.chained_optimizers)
    if place is not None:
        optimizers.insert(place, FP32Optimizer(None, optimizers[0].config, lambda *_: None))
        assert optimizers[place].is_stub_optimizer
        built.optimizer = ChainedOptimizer(optimizers)
    step(built, LongAct.attach(built.chunks, built.optimizer, LongActConfig()))
    return full_weights(built)


@pytest.mark.parametrize("place", [0, 1])
def test_stub_optimizers_are_passed_by(place: int) -> None:
    wanted, weights = ranks.run(with_a_stub, place=None)[0], ranks.run(with_a_stub, place=place)[0]
    assert all(torch.equal(weight, weights[name]) for name, weight in wanted.items())


# -- what goes wrong ---------------------------------------------------------------------------------


def skipped_steps(spec: ModelSpec, optimizer: OptimizerSpec) -> dict[str, Any]:
    built, longact = both(spec, LongActConfig(ema=0.5), optimizer)
    assert step(built, longact, 0)
    state, weights = longact.state, full_weights(built)
    outcomes = []
    for seed in (1, 2):
        config = built.optimizer.chained_optimizers[0].config
        if spec.dtype == "fp16":
            scaler = built.optimizer.chained_optimizers[0].grad_scaler
            scaler._scale.fill_(2.0**40)
        else:
            config.grad_norm_skip_threshold = 1e-9
        outcomes.append(step(built, longact, seed))
        outcomes.append(longact.state is state)
    outcomes.append(all(torch.equal(w, weights[n]) for n, w in full_weights(built).items()))
    if spec.dtype == "fp16":
        scaler._scale.fill_(1024.0)
    config.grad_norm_skip_threshold = float("inf")
    outcomes.append(step(built, longact, 3))
    fresh_built, fresh = both(spec, LongActConfig(ema=0.5), optimizer)
    step(fresh_built, fresh, 0)
    step(fresh_built, fresh, 3)
    return {
        "outcomes": outcomes,
        "updates": longact.state.updates,
        "as if never": same(cpu(longact.saliency), cpu(fresh.saliency)) and same(cpu(longact.masks), cpu(fresh.masks)),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_skipped_step_leaves_everything_as_it_was(dtype: str, distributed: bool) -> None:
    if dtype == "bf16" and not hasattr(OptimizerConfig, "grad_norm_skip_threshold"):
        pytest.skip("this Megatron skips no step of bf16")
    optimizer = OptimizerSpec(distributed=distributed, config={"initial_loss_scale": 1024.0} if dtype == "fp16" else {})
    run = {"layout": Layout(tp=2), "world_size": 4}
    for result in ranks.run(skipped_steps, **run, spec=ModelSpec(dtype=dtype), optimizer=optimizer):
        assert result["outcomes"] == [False, True, False, True, True, True]
        assert result["updates"] == 2
        assert result["as if never"]


def broken_refresh(bad_rank: int) -> dict[str, Any]:
    """NaN in one rank's activations, then a refresh without a counted token, then a good one."""
    built, longact = both(config=LongActConfig(ema=0.5))
    none = {"before_forward": lambda inputs: longact.set_tokens(torch.zeros_like(inputs, dtype=torch.bool))}
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    before = full_weights(built)[name]
    step(built, longact, 0, **none)
    rows = torch.cat([longact.model.layout.q_rows, longact.model.layout.k_rows])
    no_mask_no_update = torch.equal(full_weights(built)[name][rows], before[rows])
    unused = [longact.state.rejected, bool(longact.masks)]
    step(built, longact, 1)
    masks, saliency = cpu(longact.masks), cpu(longact.saliency)
    projection = built.chunks[-1].module.decoder.layers[-1].self_attention.linear_qkv

    right: list[Any] = []

    def spoil(module: Any, args: Any, output: Any) -> tuple[Tensor, Any]:
        right.append(output)
        return torch.where(torch.arange(output[0].shape[-1]) == 0, float("nan"), output[0]), output[1]

    with ExitStack() as stack:
        if torch.distributed.get_rank() == bad_rank:  # LongAct's hook sees NaN, the model does not
            for handle in (
                projection.register_forward_hook(spoil, prepend=True),
                projection.register_forward_hook(lambda *_: right.pop()),
            ):
                stack.callback(handle.remove)
        step(built, longact, 2)
    kept = same(masks, cpu(longact.masks)) and same(saliency, cpu(longact.saliency))
    rejected = longact.metrics()["longact/rejected_refreshes"]
    step(built, longact, 3)
    return {
        "no mask, no update": no_mask_no_update,
        "unused": unused,
        "kept": kept,
        "rejected": rejected,
        "moved on": not same(saliency, cpu(longact.saliency)),
        "updates": longact.state.updates,
    }


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
def test_an_empty_or_broken_refresh_keeps_the_mask_on_every_rank(layout: Layout) -> None:
    for result in ranks.run(broken_refresh, layout=layout, world_size=4, bad_rank=3):
        assert result["no mask, no update"]
        assert result["unused"] == [1, False]
        assert result["kept"]
        assert result["rejected"] == 2
        assert result["moved on"]
        assert result["updates"] == 4


def gradients_that_say_nothing() -> dict[str, Any]:
    """By gradient: one step in which all are zero, then two others; and the same at another scale of the loss."""
    scaled = {}
    for scale in (1024.0, 4096.0):
        built = build(ModelSpec(dtype="fp16"), OptimizerSpec(config={"initial_loss_scale": scale}))
        longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(select="gradient"))
        step(built, longact)
        scaled[scale] = cpu(longact.saliency)
    built = build(SPEC)
    finalize = built.config.finalize_model_grads_func
    factors = iter((0.0, 1.0, 1.0))

    def times_a_factor(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        built.chunks[0].scale_gradients(next(factors))

    built.config.finalize_model_grads_func = times_a_factor
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(select="gradient"))
    masks = []
    for seed in range(3):
        step(built, longact, seed)
        masks.append(cpu(longact.masks))
    return {"scaled": scaled, "masks": masks, "rejected": longact.state.rejected}


def test_gradients_of_zero_choose_nothing_and_the_scale_of_the_loss_changes_nothing() -> None:
    [result] = ranks.run(gradients_that_say_nothing)
    nothing, first, second = result["masks"]
    assert nothing == {}
    assert result["rejected"] == 1
    assert not same(first, second)
    a, b = result["scaled"].values()
    for layer in a:
        torch.testing.assert_close(a[layer]["q"], b[layer]["q"], rtol=2e-2, atol=0)


def lonely_finalize() -> str:
    built, longact = both()
    built.config.finalize_model_grads_func = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError) as error:
        step(built, longact)
    return str(error.value)


def test_a_replaced_finalize_function_is_noticed() -> None:
    assert "finalize_model_grads_func was replaced" in ranks.run(lonely_finalize)[0]


def unread() -> str:
    """What is said when the last layer's projection runs without its hooks, from the second step on."""
    built, longact = both()
    step(built, longact)
    built.chunks[-1].module.decoder.layers[-1].self_attention.linear_qkv._forward_hooks.clear()
    with pytest.raises(RuntimeError) as error:
        step(built, longact, seed=1)
    assert longact.state.updates == 1
    return str(error.value)


def test_a_layer_that_cannot_be_read_is_an_error() -> None:
    """As torch.compile(fullgraph=True), a graph or another module in its place would have it."""
    said = ranks.run(unread)[0]
    assert "could not read Q and K of layers [2]" in said
    assert "torch.compile" in said


class Told(logging.Handler):
    """Keeps what LongAct logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("megatron_longact").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("megatron_longact").removeHandler(self)


def warnings_of(mask: str) -> list[str]:
    """Two steps on rows of 12 tokens of prompt, 2 of response and 2 of padding."""
    built, longact = both()
    place = torch.arange(16)[None].expand(1, 16)
    named = {"attention": place < 14, "loss": (place >= 12) & (place < 14), "prompt": place < 12}[mask]
    tokens = random_tokens(4, 16)
    tokens[:, 14:] = 0
    with Told() as messages:
        for _ in range(2):
            train_step(built, tokens, before_forward=lambda inputs: longact.set_tokens(named))
    return [message for message in messages if "set_tokens" in message]


def test_a_loss_mask_in_place_of_attention_tokens_is_noticed_once() -> None:
    said = {mask: ranks.run(warnings_of, mask=mask)[0] for mask in ("attention", "loss", "prompt")}
    assert said["attention"] == said["prompt"] == []
    (warning,) = said["loss"]
    assert "named 8 of 56 tokens that are no padding (14%)" in warning
    assert "loss mask" in warning


def weighted(weights: Any) -> dict[int, dict[str, Tensor]]:
    built, longact = both()
    train_step(built, random_tokens(2, 16), before_forward=lambda inputs: longact.set_tokens(weights))
    return cpu(longact.saliency)


def test_a_token_that_weighs_three_counts_three_times() -> None:
    """Against the sums of bool masks: 3 a + b, where only a is named, or both."""
    first, both_parts = torch.arange(16)[None] < 6, torch.ones(1, 16, dtype=torch.bool)
    a, all_tokens = ranks.run(weighted, weights=first)[0], ranks.run(weighted, weights=both_parts)[0]
    found = ranks.run(weighted, weights=torch.where(first, 3, 1))[0]
    for layer, parts in found.items():
        for part, scores in parts.items():
            wanted = (2 * 6 * a[layer][part] + 16 * all_tokens[layer][part]) / (2 * 6 + 16)
            torch.testing.assert_close(scores, wanted, rtol=2e-6, atol=0)


def after_faults() -> dict[str, Any]:
    """A forward and an optimizer's step that raise; weights below 0; NaN of one rank's maximum; metrics asked early."""
    results: dict[str, Any] = {}
    built, longact = both(config=LongActConfig(statistic="max-abs"))
    step(built, longact)
    masks = longact.active
    projection = built.chunks[0].module.decoder.layers[1].self_attention.linear_qkv

    def fail(*_: Any) -> None:
        raise ArithmeticError("a forward, or a step, that fails")

    failing = projection.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        step(built, longact, seed=1)
    failing.remove()
    step(built, longact, seed=1)
    results["tokens after a forward that failed"] = longact.step.tokens.tolist()

    inner = longact.freezes[0].inner
    failing = inner.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        step(built, longact, seed=2)
    failing.remove()
    before = full_weights(built)
    step(built, longact, seed=3)
    weight = "decoder.layers.0.self_attention.linear_qkv.weight"
    moved = (full_weights(built)[weight] != before[weight]).any(1)
    active = longact.model.layout.fused(longact.active.q[0], longact.active.k[0], fill=True)
    results["rows moved after a step that failed"] = torch.equal(moved, active)

    rejected = longact.state.rejected
    negative = torch.arange(32)[None] - 9.0
    step(built, longact, before_forward=lambda inputs: longact.set_tokens(negative))
    results["weights below 0"] = longact.state.rejected - rejected
    spoilt = projection.register_forward_hook(lambda m, a, out: (out[0] * float("nan"), out[1]), prepend=True)
    if torch.distributed.get_rank() == 0:
        spoilt.remove()
    train_step(built, random_tokens(2, 32), before_forward=name_all(longact), step=False)
    spoilt.remove()
    results["NaN of one rank"] = longact.step.pending.rejected - longact.state.rejected
    step(built, longact, seed=4)
    early = longact.metrics()
    longact.load_state_dict({**longact.state_dict(), "refreshes": 77})
    results["metrics after a load"] = longact.metrics()[metrics.REFRESHES], early[metrics.REFRESHES] < 77
    assert masks is not longact.active
    return results


def test_what_went_wrong_leaves_nothing_in_the_next_step() -> None:
    for result in ranks.run(after_faults, world_size=2):
        assert result == {
            "tokens after a forward that failed": [32, 32],
            "rows moved after a step that failed": True,
            "weights below 0": 1,
            "NaN of one rank": 1,
            "metrics after a load": (77, True),
        }


def resumed_with(config: dict[str, Any]) -> tuple[float, float, bool]:
    """Active fractions of Q and K after a step with other settings than the checkpoint's; whether masks stayed."""
    built, longact = both()
    step(built, longact)
    state = longact.state_dict()
    longact.detach()
    changed = LongActConfig(**config, on_mismatch="use-flags", refresh_interval=0)
    longact = LongAct.attach(built.chunks, built.optimizer, changed)
    longact.load_state_dict(state)
    stayed = bool(longact.masks)
    step(built, longact, seed=1)
    found = longact.metrics()
    return found[metrics.ACTIVE_FRACTION_Q], found[metrics.ACTIVE_FRACTION_K], stayed


def test_use_flags_uses_the_flags() -> None:
    q, k, stayed = ranks.run(resumed_with, config={"targets": "q", "ratio": 0.6})[0]
    assert (round(q, 1), k, stayed) == (0.6, 1.0, False)
    assert ranks.run(resumed_with, config={"warmup_steps": 9})[0] == (1.0, 1.0, False)
    assert ranks.run(resumed_with, config={"moments": "reset"})[0][2]
    saved = asdict(LongActConfig())
    assert not selects_otherwise(saved, LongActConfig(seed=5))  # nothing is drawn
    assert selects_otherwise(saved | {"select": "random"}, LongActConfig(select="random", seed=5))


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
    built, longact = both()
    step(built, longact)
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
        step(built, longact, seed=1)
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
        step(built, longact)
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


# -- what a profile shows, and what a checkpoint in FP8 needs -----------------------------------------


def profiled() -> dict[str, int]:
    built, longact = both()
    step(built, longact)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(built, longact, seed=1)
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


def weights_after_load(fp8_param_gather: bool) -> tuple[bool, bool]:
    """Whether model weights that a checkpoint got wrong are their masters' again, and the frozen ones too."""
    built, longact = both(ModelSpec(dtype="bf16"), optimizer=OptimizerSpec(distributed=True))
    step(built, longact)
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
