"""tools/plan.py against real ranks: what collectives carry, what is held, saved and read, byte by byte."""

import gc
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion.mapping import entries_of
from megatron_longact.conversion.megatron_args import model_args
from megatron_longact.megatron.attention_plan import AttentionPlan, Piece
from megatron_longact.planning import cost
from megatron_longact.planning.models import PRESETS, find_model
from megatron_longact.planning.report import make_plan
from megatron_longact.planning.roofline import Assumptions, flops
from megatron_longact.planning.run_shape import Attention, Batch, Parallel
from megatron_longact.planning.shared_prompts import Group
from megatron_longact.planning.training_memory import training_memory
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.selection import is_usable
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import name_all
from tools import plan

OPERATIONS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce")
LAYERS4 = ModelSpec(layers=4)
BIAS = ModelSpec(config={"add_qkv_bias": True})
GATE = ModelSpec(config={"attention_output_gate": True})
WHOLE, DISTRIBUTED = OptimizerSpec(), OptimizerSpec(distributed=True)


@dataclass(frozen=True)
class Case:
    """A layout that is planned and run."""

    spec: ModelSpec
    layout: Layout
    world_size: int
    optimizer: OptimizerSpec
    config: LongActConfig

    @property
    def parallel(self) -> Parallel:
        used = self.layout.tp * self.layout.pp * self.layout.cp
        return Parallel(
            tp=self.layout.tp,
            pp=self.layout.pp,
            cp=self.layout.cp,
            dp=self.world_size // used,
            distributed_optimizer=self.optimizer.distributed,
        )

    @property
    def attention(self) -> Attention:
        gate = bool(self.spec.config.get("attention_output_gate"))
        layout = QKVLayout(self.spec.heads, self.spec.groups, self.spec.kv_channels, gate)
        return Attention(self.spec.layers, self.spec.hidden, layout, bool(self.spec.config.get("add_qkv_bias")))


def case(
    spec: ModelSpec = ModelSpec(),  # noqa: B008
    layout: Layout = Layout(),  # noqa: B008
    world_size: int = 1,
    optimizer: OptimizerSpec = WHOLE,
    **config: Any,
) -> Case:
    return Case(spec, layout, world_size, optimizer, LongActConfig(**config))


CASES = {
    "tp1": case(),
    "tp2": case(layout=Layout(tp=2), world_size=2),
    "tp2, scope model, max-abs": case(layout=Layout(tp=2), world_size=2, scope="model", statistic="max-abs"),
    "tp2, bias, targets q, ema": case(BIAS, Layout(tp=2), 2, targets="q", ema=0.5),
    "tp2, gate, weight norms, grad-only": case(GATE, Layout(tp=2), 2, select="weight-norm", freeze="grad-only"),
    "dp2 distributed": case(world_size=2, optimizer=DISTRIBUTED),
    "tp2 dp2, scope head": case(layout=Layout(tp=2), world_size=4, optimizer=DISTRIBUTED, scope="head"),
    "tp2 dp2, gradient": case(layout=Layout(tp=2), world_size=4, optimizer=DISTRIBUTED, select="gradient"),
    "tp2 pp2, rms": case(LAYERS4, Layout(tp=2, pp=2), 4, DISTRIBUTED, statistic="rms"),
    "tp4, groups < tp": case(layout=Layout(tp=4), world_size=4),
    "tp4, groups < tp, tap norm, held moments": case(layout=Layout(tp=4), world_size=4, tap="norm", moments="hold"),
}


@contextmanager
def counted(names: dict[int, str]) -> Iterator[Counter[tuple[str, str, int, int]]]:
    """Count what the real collectives carry: operation, group, its size, and bytes of the tensor given."""
    seen: Counter[tuple[str, str, int, int]] = Counter()
    originals = {name: getattr(dist, name) for name in OPERATIONS}

    def counting(name: str) -> Callable[..., Any]:
        @wraps(originals[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            given = next(a for a in reversed(args) if isinstance(a, torch.Tensor))
            group = kwargs.get("group") or dist.group.WORLD
            entry = (name, names.get(id(group), "other"), group.size(), given.numel() * given.element_size())
            seen[entry] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(dist, name, counting(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measured(spec: ModelSpec, optimizer: OptimizerSpec, config: LongActConfig) -> dict[str, Any]:
    """What a step with LongAct carries, holds and saves more than one without, on this rank."""
    built = build(spec, optimizer)
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
    }
    names = {id(group): name for name, group in groups.items()}
    tokens = random_tokens(2, 32)
    train_step(built, tokens)  # makes the optimizer's state
    with counted(names) as dense:
        train_step(built, tokens)
    bytes_before = live_bytes()
    longact = LongAct.attach(built.chunks, built.optimizer, config)
    saved = 0

    def look(*_: Any) -> None:
        nonlocal saved
        saved = sum(v.untyped_storage().nbytes() for f in longact.freezes for *_, v in f._saved)

    longact.freezes[0].inner.register_step_pre_hook(look)
    before_forward = name_all(longact) if config.reads_activations else None
    with counted(names) as masked:
        train_step(built, tokens, before_forward=before_forward)
    train_step(built, tokens, before_forward=before_forward)  # until then the first mask is the mask
    held = live_bytes() - bytes_before
    with counted(names) as metrics:
        longact.metrics()
    frozen = sum(len(rows) for parameter, rows in longact.step.frozen.items() if parameter.dim() == 2)
    longact.detach()
    assert not dense - masked

    model = longact.model
    local = [layer.layer_number for layer in model.layers]
    whole = model.global_saliency(config)
    parallel = Parallel(tp=groups["tp"].size())
    channels = cost.num_accumulated(Attention(0, 0, model.layout), parallel, config)
    sums = torch.ones(len(local), channels + 1)

    return {
        "refresh": masked - dense,
        "metrics": metrics,
        "held": held,
        "saved": saved,
        "frozen": frozen,
        "layers": len(longact.model.layers),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "peak": peak_bytes(lambda: is_usable(whole.from_sums(sums))) if config.reads_activations else 0,
    }


def live_bytes() -> int:
    """Bytes of all tensor storages that Python can reach, when the threads of collectives have let go of theirs."""

    def look() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    looks = [look()]
    while len(looks) < 3 or len(set(looks[-3:])) > 1:
        time.sleep(0.02)
        looks.append(look())
    return looks[-1]


def peak_bytes(action: Callable[[], Any]) -> int:
    """Bytes that an action has allocated at its peak."""
    action()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def as_counter(calls: list[cost.Collective]) -> Counter[tuple[str, str, int, int]]:
    return Counter((call.operation, call.group, call.size, call.nbytes) for call in calls)


@pytest.mark.parametrize("name", CASES)
def test_plan_is_what_real_ranks_do(name: str) -> None:
    run = CASES[name]
    attention, parallel, config = run.attention, run.parallel, run.config
    results = ranks.run(
        measured,
        layout=run.layout,
        world_size=run.world_size,
        spec=run.spec,
        optimizer=run.optimizer,
        config=config,
    )
    wanted_held, wanted_saved = 0.0, 0.0
    for result in results:
        layers = result["layers"]
        place = cost.Place(layers, result["tp_rank"])
        assert result["refresh"] == as_counter(cost.refresh_collectives(attention, parallel, config, layers=layers))
        assert result["metrics"] == as_counter(cost.metric_collectives(parallel))
        held = cost.held(attention, parallel, config, place=place, on_gpu=False)
        saved = cost.saved_masters(attention, parallel, config, place=place)
        exact = sum(part.mean for name, part in held.items() if name != "host: frozen rows")
        assert result["held"] == exact + 8 * result["frozen"]
        assert result["frozen"] * 8 <= held["host: frozen rows"].most
        assert result["saved"] <= saved.most
        peak = cost.reduction_temporaries(attention, parallel, config, layers=layers, on_gpu=False)
        assert result["peak"] == peak
        if config.scope == "head":
            assert result["held"] == sum(part.mean for part in held.values())
        wanted_held += sum(part.mean for part in held.values())
        wanted_saved += saved.mean
    assert sum(result["held"] for result in results) == pytest.approx(wanted_held, rel=1e-12)
    assert sum(result["saved"] for result in results) == pytest.approx(wanted_saved, rel=1e-12)


def test_held_is_what_the_benchmark_measured() -> None:
    """The MiB of docs/performance.md at 111 M and at 13 M parameters, TP 2 over gloo."""
    for hidden, layers, measured_mib in ((1024, 9, 0.17), (512, 4, 0.04)):
        heads = hidden // 64
        attention = Attention(layers, hidden, QKVLayout(heads, heads // 4, 64))
        held = cost.held(attention, Parallel(tp=2), LongActConfig(), place=cost.Place(layers, 0), on_gpu=False)
        for name in ("last updates of rows", "first mask"):  # not remembered yet when it was measured
            del held[f"{name}, whole model"]
        assert round(sum(part.mean for part in held.values()) / 2**20, 2) == measured_mib


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen3-8b", 8_190_735_360), ("qwen3-32b", 32_762_123_264), ("qwen3-235b-a22b", 235_093_634_560)],
)
def test_presets_are_the_models_of_their_names(name: str, parameters: int, tmp_path: Path) -> None:
    model = find_model(name)
    assert sum(entry.numel for entry in entries_of(model)) == parameters
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]))
    assert find_model(str(tmp_path)) == find_model(str(tmp_path / "config.json")) == model


QWEN3_235B = ["--model", "Qwen3-235B-A22B", "--tp", "4", "--pp", "16", "--cp", "2", "--dp", "8", "--ep", "16"]
STAGES = ["--first-stage-layers", "5", "--last-stage-layers", "5"]
BATCH = ["--seq-length", "32768", "--global-batch-size", "128"]
SHARED = ["--model", "qwen3-8b", "--group-size", "16", "--response-length", "256"]


def test_a_plan_for_1024_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    command = [*QWEN3_235B, *STAGES, *BATCH, "--longact-refresh-interval", "5", "--json", str(file)]
    assert plan.main(command) == 0
    screen, numbers = capsys.readouterr().out, json.loads(file.read_text())
    assert "1,024 GPUs" in screen
    assert numbers["gpus"] == 1024
    assert numbers["rank"]["layers"] == 6
    reduced = 6 * ((64 + 2 * 4) * 128 // 4 + 1) * 4
    assert [call["nbytes"] for call in numbers["refresh_collectives"]] == [reduced, reduced, 94 * (64 + 4) * 128 * 4]
    assert set(numbers["share_of_step"]) == {"1", "5", "10"}
    assert numbers["share_of_step"]["1"] > numbers["share_of_step"]["5"] > numbers["share_of_step"]["10"] > 0
    for name in (field.name for field in fields(Assumptions)):
        assert f"--{name.replace('_', '-')} " in screen


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seq-length", "0"], "--seq-length is 0; it must be 1 or more"),
        (["--micro-batch-size", "0"], "--micro-batch-size is 0"),
        (["--tp", "0"], "--tp is 0; it must be 1 or more"),
        (["--mfu", "0"], "--mfu is 0.0; it must be a share in (0, 1]"),
        (["--mfu", "40"], "--mfu is 40.0; it must be a share"),
        (["--hbm-gbps", "-3"], "--hbm-gbps is -3.0; it must be more than 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node is 0"),
    ],
)
def test_sizes_that_cannot_be_are_said_by_their_flag(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "qwen3-8b", "--seq-length", "8192", "--global-batch-size", "64"]
    assert plan.main([*command, *flags]) == 1
    assert said in capsys.readouterr().err


def test_every_assumption_counts() -> None:
    """Each assumption moves the share, all but that of the other precision and the link that is not used."""
    model, batch = find_model("qwen3-8b"), Batch(seq_length=8192, global_batch_size=64)
    parallel = Parallel(tp=4, dp=16)

    def over_dense(**assumed: float) -> float:
        planned = make_plan(model, parallel, batch, LongActConfig(), assumed=Assumptions(**assumed))
        return planned.share.over_dense(1)

    for field in fields(Assumptions):
        other = field.default / 100 if field.name in ("mfu", "hbm_efficiency") else field.default * 100  # of shares
        changed = over_dense(**{field.name: type(field.default)(other)})
        assert (changed == over_dense()) == (field.name == "peak_tflops_fp8"), field.name


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qwen3-8b", {"tp": 4, "dp": 2}),
        ("qwen3-8b", {"pp": 4, "dp": 2, "distributed_optimizer": False}),
        ("qwen3-235b-a22b", {"tp": 4, "pp": 2, "dp": 8, "ep": 8}),
    ],
)
def test_weights_and_optimizer_are_those_of_megatrons_own_estimate(name: str, sizes: dict[str, Any]) -> None:
    """But for the weights of q/k-layernorm, which it leaves out, and of the last norm, which it spreads over stages."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    model, parallel = find_model(name), Parallel(**sizes)
    args = SimpleNamespace(
        **{"num_experts": None, "moe_shared_expert_intermediate_size": None, "mtp_num_layers": None},
        **{"multi_latent_attention": False, "moe_latent_size": None, "expert_tensor_parallel_size": parallel.tp},
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        data_parallel_size=parallel.dp,
        expert_model_parallel_size=parallel.ep,
        world_size=parallel.world_size,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    vars(args).update(model_args(model))
    batch = Batch(seq_length=1024, global_batch_size=8)
    planned = training_memory(model, parallel, batch, row=1024)
    parts = [planned[part] for part in ("weights", "gradients, fp32", "masters and moments")]
    norms = 2 * model.head_dim * max(parallel.stages(model.num_layers)) + model.hidden_size * (1 - 1 / parallel.pp)
    norms *= 6 + 12 / parallel.optimizer_shards
    assert sum(parts) - norms == pytest.approx(compute_weight_and_optimizer_memory(args), rel=1e-12)


@pytest.mark.parametrize(("row", "responses"), [(40, [3, 3, 2]), (100, [8]), (30, [2, 2, 2, 2])])
def test_shared_prompts_are_counted_token_by_token(row: int, responses: list[int]) -> None:
    group = Group(prompt=18, response=6, size=8, row=row)
    assert group.responses_of_rows == responses
    rows = [[(0, i) for i in range(18)] + [(s, i) for s in range(1, n + 1) for i in range(6)] for n in responses]
    assert group.shared.tokens == sum(map(len, rows))
    assert group.apart.tokens == 8 * 24
    before = {False: 0, True: 18}  # a response has its prompt in front
    # of a token's own key half counts, as in the roofline's causal sequence
    assert group.shared.pairs == sum(before[s > 0] + i + 0.5 for tokens in rows for s, i in tokens)


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_gathered_keys_are_those_of_the_attention(cp: int) -> None:
    group = Group(prompt=18, response=6, size=8, row=66)
    own = [(begin, begin + 6) for begin in range(18, 66, 6)]
    row = AttentionPlan((Piece((0, 18), ((0, 18),)), *(Piece(span, ((0, 18), span)) for span in own)))
    chunks = list(itertools.pairwise(66 * i // (2 * cp) for i in range(2 * cp + 1)))
    held = [(chunks[rank], chunks[-1 - rank]) for rank in range(cp)] if cp > 1 else [((0, 66),)]
    assert group.gathered_keys(8, cp=cp) == max(row.of(spans).key_index.numel() for spans in held)


def test_what_sharing_saves_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "qwen3-8b", "--tp", "4", "--cp", "2", "--seq-length", "131072", "--global-batch-size", "32"]
    command += ["--group-size", "16", "--response-length", "1024", "--json", str(tmp_path / "plan.json")]
    assert plan.main(command) == 0
    assert "16 responses a row, 2 rows a step" in capsys.readouterr().out
    shared = json.loads((tmp_path / "plan.json").read_text())["shared_prompts"]
    assert shared["tokens"] == [32 * 131072, 2 * (130048 + 16 * 1024)]
    key = 2 * 8 * 128 // 4 * 2  # bytes of K and V, on one of four tensor-parallel ranks
    assert shared["sent"] == 36 * shared["tokens"][1] // 2 * key
    dense = flops(find_model("qwen3-8b"), tokens=32 * 131072, pairs=32 * 131072**2 / 2, outputs=32 * 1024)
    assert shared["flops"][0] == dense


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*QWEN3_235B, *BATCH], "94 layers do not divide into --pp 16 stages"),
        (["--model", "qwen3-9b", *BATCH], "none of qwen3-8b, qwen3-32b, qwen3-235b-a22b"),
        (["--model", "qwen3-8b", "--tp", "3", *BATCH], "--tp is 3"),
        (["--model", "qwen3-8b", "--dp", "3", *BATCH], "--global-batch-size 128 is no multiple"),
        (["--model", "qwen3-8b", "--cp", "3", *BATCH], "--seq-length 32768 does not divide by --cp 3"),
        (["--model", "qwen3-8b", "--dp", "8", "--ep", "8", *BATCH], "the model has no experts"),
        (["--model", "qwen3-8b", "--ep", "8", *BATCH], "--ep is 8; it must divide"),
        (["--model", "qwen3-8b", "--tp", "0", *BATCH], "--tp is 0"),
        (["--model", "qwen3-8b", "--longact-ratio", "7", *BATCH], "--longact-ratio is 7.0"),
        (["--model", "qwen3-8b", "--group-size", "16", *BATCH], "need both --group-size and --response-length"),
        ([*SHARED, "--row-length", "32768", "--seq-length", "32769", "--global-batch-size", "128"], "do not fit"),
        ([*SHARED, "--dp", "16", *BATCH], "no multiple of --group-size 16 x data parallel size 16"),
        ([*SHARED, "--seq-length", "256", "--global-batch-size", "128"], "leaves no prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
