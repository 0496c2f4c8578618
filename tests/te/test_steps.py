"""Steps of Transformer Engine's modules in bf16 under Megatron's optimizers, and the strict freeze around FusedAdam.

The assertions are those of the GPU tier, `tests/gpu/test_transformer_engine.py`. Torch stands in for the kernels
(`tests.te.torch_kernels`), gloo for NCCL; modules, autograd functions, weight gradients that are accumulated into
`main_grad`, optimizers and their step hooks are the real ones. Not shown: anything in FP8, moments in FP8 included, and
the CPU-offloaded optimizer, whose pinned copies would be the masters themselves.
"""

from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig
from tests import ranks
from tests.gpu import test_transformer_engine as gpu_tier
from tests.gpu.models import GPUSpec, build, train_step
from tests.ranks import Layout

NEEDS_A_GPU = {"moments fp8", "moments fp8 and fp16", "optimizer offloaded"}
OPTIONS = sorted(gpu_tier.OPTIONS.keys() - NEEDS_A_GPU)


def recorded(name: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    gpu_tier.test_frozen_masters_are_bit_identical(None, name, seen.__setitem__)
    return seen


@pytest.mark.parametrize("name", OPTIONS)
def test_frozen_masters_are_bit_identical(name: str) -> None:
    assert ranks.run(recorded, name=name) == [{"optimizer": "transformer_engine FusedAdam"}]


def late_gradients() -> None:
    gpu_tier.test_weight_gradients_that_come_after_the_backward(None)


def test_weight_gradients_that_come_after_the_backward() -> None:
    ranks.run(late_gradients)


# -- several ranks -------------------------------------------------------------------------------------

OVERLAPPED = {"ddp": {"overlap_grad_reduce": True}}
WIDE: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {}),
    "tp2 sequence parallel": (2, {"transformer": {"sequence_parallel": True}}),
    "tp2 fused accumulation": (2, gpu_tier.OPTIONS["fused accumulation"]),
    "dp2 overlapped": (1, {"ddp": {"overlap_grad_reduce": True}}),
    "dp2 overlapped precision-aware": (
        1,
        {"ddp": {"overlap_grad_reduce": True}, **gpu_tier.OPTIONS["precision-aware"]},
    ),
}


def steps_on_ranks(tp: int, options: dict[str, Any]) -> dict[str, Any]:
    settings = {"tensor_model_parallel_size": tp, **options.get("transformer", {})}
    model = build(GPUSpec(**{**options, "transformer": settings}))
    with LongAct.attach([model.chunk], model.optimizer, LongActConfig()) as longact:
        for seed in range(3):
            gpu_tier.check_step(model, longact, seed)
        metrics = longact.metrics()
        names = {parameter: name for name, parameter in model.chunk.named_parameters()}
        return {
            "masks": torch.cat([mask[part] for mask in longact.masks.values() for part in ("q", "k")]),
            "shards": {names[shard.parameter] for freeze in longact.freezes for shard in freeze.shards},
            "refreshes": metrics["longact/refreshes"],
        }


@pytest.mark.parametrize("case", WIDE)
def test_ranks_freeze_their_own_rows_and_agree_on_the_masks(case: str) -> None:
    tp, options = WIDE[case]
    first, second = ranks.run(steps_on_ranks, world_size=2, layout=Layout(tp=tp), tp=tp, options=options)
    assert torch.equal(first["masks"], second["masks"])
    assert first["refreshes"] == second["refreshes"] == 3
    assert len(first["shards"] | second["shards"]) == 2
    assert len(first["shards"] & second["shards"]) == (2 if tp == 2 else 0)  # a data-parallel rank owns one weight each


# -- FusedAdam's masters -------------------------------------------------------------------------------


def masters(longact: LongAct) -> list[torch.Tensor]:
    """fp32, of what LongAct freezes; put together from bf16 weights and int16 remainders where they are kept apart."""
    found = []
    for shard in (shard for freeze in longact.freezes for shard in freeze.shards):
        kept = shard.masters()
        if kept[-1].dtype == torch.int16:
            weight, remainder = (part.detach().view(torch.int16).int() for part in kept)
            bits = ((weight - (remainder < 0).int()) << 16) | (remainder & 0xFFFF)
            kept = [bits.view(torch.float32)]
        found.append(kept[-1].detach().float().clone())
    return found


def trained(name: str, config: LongActConfig) -> dict[str, Any]:
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    model = build(GPUSpec(**gpu_tier.OPTIONS[name]))
    with LongAct.attach([model.chunk], model.optimizer, config) as longact:
        kinds = {str(shard.masters()[-1].dtype) for freeze in longact.freezes for shard in freeze.shards}
        train_step(model, longact, seed=1)  # in later ones weights differ that lie halfway between two bf16 values
        return {"masters": masters(longact), "kinds": kinds}


def both(config: LongActConfig) -> list[dict[str, Any]]:
    return [trained(name, config) for name in ("fp32 masters", "precision-aware")]


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_weights_with_int16_remainders_are_the_fp32_masters_bit_for_bit(ratio: float) -> None:
    """So the freeze puts both parts back, and in step."""
    [(whole, parts)] = ranks.run(both, config=LongActConfig(ratio=ratio))
    assert whole["kinds"] == {"torch.float32"}
    assert parts["kinds"] == {"torch.int16"}
    assert all(map(torch.equal, whole["masters"], parts["masters"]))
