"""The CPU mode: each shim that Megatron's own runs would not show at once if it were gone."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_longact
from megatron_longact.megatron.cpu import CPU_MODE_FLAGS, missing_cpu_flags
from tests import ranks
from tests.models import Built, ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout


def test_flags_that_the_user_gave_are_left_alone() -> None:
    given = ["--transformer-impl", "inference_optimized", "--distributed-backend=nccl", "--no-rope-fusion"]
    missing = missing_cpu_flags(given)
    assert set(CPU_MODE_FLAGS) - set(missing) == {
        "--transformer-impl=local",
        "--distributed-backend=gloo",
        "--no-rope-fusion",
    }


def test_only_the_launcher_and_the_tools_import_it() -> None:
    package = Path(megatron_longact.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "megatron_longact.megatron.cpu" in names:
                importers.add(path.relative_to(package).as_posix())
    assert importers == {"run.py", "megatron/tool_command.py"}


# -- devices and generators ----------------------------------------------------------------------------


def devices() -> dict[str, Any]:
    x = torch.zeros(2)
    made = [
        torch.tensor([1.0], device="cuda"),
        torch.empty(2, device=torch.device("cuda", 0), pin_memory=True),
        torch.arange(3, device="cuda:0"),
        torch.zeros_like(x, device="cuda"),
        x.new_ones(2, device="cuda"),
        x.to("cuda"),
        x.to(device="cuda", dtype=torch.bfloat16),
        x.cuda().pin_memory(),
        torch.nn.Linear(2, 2).to("cuda").cuda().weight,
    ]
    with torch.device("meta"):
        meta = torch.empty(2)
    return {
        "devices": {str(tensor.device) for tensor in made},
        "meta": str(meta.device),
        "dtype": made[6].dtype,
        "types": [torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        "cast": x.type(torch.float16).dtype,
        "available": torch.cuda.is_available(),
    }


def test_cuda_means_the_cpu() -> None:
    [seen] = ranks.run(devices)
    assert seen["devices"] == {"cpu"}
    assert seen["meta"] == "meta"
    assert seen["dtype"] == torch.bfloat16
    assert seen["types"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.cuda.HalfTensor"]
    assert seen["cast"] == torch.float16
    assert not seen["available"]


def draws() -> dict[str, list[float]]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.manual_seed(5)
    plain = torch.rand(4).tolist()
    torch.manual_seed(5)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(4).tolist()
    return {"plain": plain, "forked": forked, "after": torch.rand(4).tolist()}


def test_random_number_tracker_has_its_own_stream_a_rank() -> None:
    first, second = ranks.run(draws, layout=Layout(tp=2), world_size=2)
    assert first["plain"] == first["after"] == second["plain"] == second["after"]
    assert len({tuple(first["plain"]), tuple(first["forked"]), tuple(second["forked"])}) == 3


def dropout_gradients(recompute: bool) -> list[float]:
    config: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    if recompute:
        config |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    built = build(ModelSpec(config=config))
    train_step(built, random_tokens(2, 16), step=False)
    return [float(p.main_grad.double().norm()) for p in built.chunks[0].parameters()]


def test_recomputation_draws_the_same_dropout() -> None:
    plain = ranks.run(dropout_gradients, layout=Layout(tp=2), world_size=2, recompute=False)
    assert ranks.run(dropout_gradients, layout=Layout(tp=2), world_size=2, recompute=True) == plain


# -- layers --------------------------------------------------------------------------------------------


def marked(sequence_parallel: bool) -> set[bool]:
    built = build(ModelSpec(config={"sequence_parallel": sequence_parallel}))
    named = built.chunks[0].module.named_parameters()
    return {parameter.sequence_parallel for name, parameter in named if "norm" in name}


def test_norms_are_marked_for_sequence_parallel() -> None:
    assert ranks.run(marked, layout=Layout(tp=2), world_size=2, sequence_parallel=True) == [{True}] * 2
    assert ranks.run(marked, layout=Layout(tp=2), world_size=2, sequence_parallel=False) == [{False}] * 2


def weights_after(spec: ModelSpec) -> tuple[float, dict[str, torch.Tensor]]:
    built = build(spec)
    _, norm = train_step(built, random_tokens(2, 16))
    assert norm is not None
    return norm, full_weights(built)


def test_dispatchers_agree() -> None:
    results = []
    for dispatcher in ("allgather", "alltoall"):
        config = {"num_moe_experts": 4, "moe_token_dispatcher_type": dispatcher, "moe_router_topk": 2}
        run = {"layout": Layout(ep=2), "world_size": 2, "spec": ModelSpec(config=config)}
        results.append(ranks.run(weights_after, **run)[0])
    (norm, weights), (other_norm, others) = results
    assert norm == pytest.approx(other_norm, rel=1e-5)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name])


# -- checkpoints ---------------------------------------------------------------------------------------

ADAM = OptimizerSpec()
DISTRIBUTED = OptimizerSpec(distributed=True)
SGD = OptimizerSpec(config={"optimizer": "sgd", "sgd_momentum": 0.9})


def inner_state(built: Built) -> list[dict[str, Any]]:
    optimizers = getattr(built.optimizer, "chained_optimizers", [built.optimizer])
    return [
        {key: value.clone() for key, value in state.items()}
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
    ]


def sharded(built: Built, sharding: str, *, loading: bool) -> dict[str, Any]:
    [chunk] = built.chunks
    metadata = {"distrib_optim_sharding_type": sharding}
    model = chunk.module.sharded_state_dict(metadata=metadata)
    optimizer = built.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def resume(spec: ModelSpec, optimizer: OptimizerSpec, sharding: str, path: str, trained: int) -> dict[str, Any]:
    """Save after `trained` steps, go on for two; load into a new model, and go on for the same two."""
    from megatron.core import dist_checkpointing

    def go_on(built: Built) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        for seed in (10, 11):
            train_step(built, random_tokens(2, 32, seed=seed))
        return inner_state(built), full_weights(built)

    straight = build(spec, optimizer)
    for seed in range(trained):
        train_step(straight, random_tokens(2, 32, seed=seed))
    dist_checkpointing.save(sharded(straight, sharding, loading=False), path)
    wanted = go_on(straight)

    again = build(spec, optimizer)
    for parameter in again.chunks[0].parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load(sharded(again, sharding, loading=True), path)
    again.chunks[0].module.load_state_dict(loaded["model"])
    again.optimizer.load_state_dict(loaded["optimizer"])
    return {"wanted": wanted, "got": go_on(again)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("optimizer", "sharding"),
    [
        (ADAM, "none"),
        (SGD, "none"),
        (DISTRIBUTED, "dp_reshardable"),
        (DISTRIBUTED, "fully_reshardable"),
    ],
    ids=["adam", "sgd", "dp_reshardable", "fully_reshardable"],
)
def test_torch_optimizers_resume_bitwise(dtype: str, optimizer: OptimizerSpec, sharding: str, tmp_path: Path) -> None:
    run = {"layout": Layout(), "world_size": 2, "spec": ModelSpec(dtype=dtype), "optimizer": optimizer}
    for result in ranks.run(resume, **run, sharding=sharding, path=str(tmp_path), trained=2):
        (wanted_state, wanted), (state, weights) = result["wanted"], result["got"]
        assert len(state) == len(wanted_state)
        for mine, theirs in zip(state, wanted_state, strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert torch.equal(mine[key], theirs[key]), key
            assert float(mine.get("step", 4)) == 4
        for name in wanted:
            assert torch.equal(weights[name], wanted[name]), name


@pytest.mark.parametrize("optimizer", [ADAM, DISTRIBUTED], ids=["adam", "distributed"])
def test_checkpoint_before_the_first_update(optimizer: OptimizerSpec, tmp_path: Path) -> None:
    run = {"layout": Layout(), "world_size": 2, "spec": ModelSpec(dtype="bf16"), "optimizer": optimizer}
    for result in ranks.run(resume, **run, sharding="fully_reshardable", path=str(tmp_path), trained=0):
        for name in result["wanted"][1]:
            assert torch.equal(result["got"][1][name], result["wanted"][1][name]), name


def test_state_of_another_optimizer_is_left_empty() -> None:
    """Transformer Engine's Adam: with an entry in its state Megatron would not allocate it, and lose the moments."""
    from megatron_longact.megatron.cpu.optimizer_checkpoints import _make_state

    weights = [torch.nn.Parameter(torch.zeros(2))]
    others, adam = torch.optim.Adagrad(weights), torch.optim.AdamW(weights)
    others.state.clear()
    _make_state(others)
    _make_state(adam)
    assert not others.state
    assert adam.state[weights[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
