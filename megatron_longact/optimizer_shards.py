"""Where Megatron's optimizers keep the master values of a parameter: one small resolver a class.

Sources: megatron/core/optimizer/optimizer.py, distrib_optimizer.py, cpu_offloading/hybrid_optimizer.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor, nn

from megatron_longact.config import LongActConfig
from megatron_longact.masked_update import Shard, is_offloaded

_SCALED = (torch.float16, torch.uint8)  # how Transformer Engine's FusedAdam keeps moments in fp16 and fp8


def chained(optimizer: Any) -> list[Any]:
    """The Megatron optimizers that a `ChainedOptimizer` holds, at any depth, or the one given; stubs left out.

    A class made from it, as the layer-wise one is, is not looked through: it does more than step what it holds.
    """
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    if type(optimizer) is not ChainedOptimizer:
        return [optimizer]
    return [one for held in optimizer.chained_optimizers for one in chained(held)]


def resolve_shards(optimizer: Any, parameters: Iterable[nn.Parameter], config: LongActConfig) -> list[Shard]:
    """The slices of `parameters` that one Megatron optimizer of this rank owns; none is a valid answer.

    Raises `ValueError` for an optimizer whose masters we do not know, by name.
    """
    resolver = _RESOLVERS.get(type(optimizer).__name__)
    if resolver is None:
        raise ValueError(
            f"LongAct does not know where {type(optimizer).__name__} keeps its master parameters; "
            f"it works with: {', '.join(_RESOLVERS)}"
        )
    _check_inner(optimizer.optimizer, config)
    wanted = set(parameters)
    return [shard for shard in resolver(optimizer) if shard.parameter in wanted]


def master_shards(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Shard]:
    """The same for whoever only reads: the parameters themselves for an optimizer whose masters we do not know."""
    resolver = _RESOLVERS.get(type(optimizer).__name__)
    shards = _themselves(parameters) if resolver is None else resolver(optimizer)
    return [shard for shard in shards if shard.parameter in set(parameters)]


@torch.no_grad()
def derive_quantized_weights(optimizer: Any) -> None:
    """Quantise weights that are kept in FP8 or FP4 anew from their fp32 masters, as after a step; collective.

    A checkpoint holds them rounded to bf16, and what Megatron quantises from that on loading need not be what its
    next step would. Every optimizer is ready before a chunk is synced, and each chunk is synced once: dense and expert
    optimizers share chunks, and a sync zeroes the buffer that MXFP8 weights are gathered from.
    Source: megatron/core/optimizer/optimizer.py, `ChainedOptimizer._step_with_deferred_mxfp8_param_sync`.
    """
    quantized = [one for one in chained(optimizer) if _keeps_quantized_weights(one)]
    for one in quantized:
        if one.config.reuse_grad_buf_for_mxfp8_param_ag:
            one._copy_main_params_to_param_buffer()
        else:
            one._copy_main_params_to_model_params()
    for chunk in {id(chunk): chunk for one in quantized for chunk in one.model_chunks}.values():
        chunk.start_param_sync(force_sync=True)


def freezes_exactly(optimizer: Any, config: LongActConfig) -> bool:
    """Whether no weight of a frozen row can move: in FP8 or FP4 its image does, with a scale that it shares."""
    return config.freeze == "strict" and not any(map(_keeps_quantized_weights, chained(optimizer)))


def _keeps_quantized_weights(optimizer: Any) -> bool:
    ddp_config = getattr(optimizer, "ddp_config", None)
    return any(getattr(ddp_config, name, False) for name in ("fp8_param_gather", "fp4_param_gather"))


def _check_inner(inner: Any, config: LongActConfig) -> None:
    precision_aware = getattr(inner, "master_weights", None)
    if config.moments != "decay" and (precision_aware or is_offloaded(inner)):
        raise ValueError(
            f"--longact-moments is {config.moments}; with --use-precision-aware-optimizer and "
            "--optimizer-cpu-offload it must be decay"
        )
    scaled = [name for name in ("exp_avg_dtype", "exp_avg_sq_dtype") if getattr(inner, name, None) in _SCALED]
    if config.moments != "decay" and scaled:
        flags = " and ".join("--" + name.replace("_", "-") for name in scaled)
        raise ValueError(
            f"--longact-moments is {config.moments}; with {flags} fp16 or fp8 it must be decay: such moments are "
            "scaled anew at each step"
        )
    if precision_aware and getattr(inner, "master_weight_dtype", torch.float32) == torch.float16:
        raise ValueError("strict freeze needs --main-params-dtype fp32: fp16 masters are rescaled at each step")


def _whole(parameter: nn.Parameter, master: Tensor, optimizer: Any) -> Shard:
    return Shard(parameter, 0, parameter.numel(), _copies(optimizer.optimizer, master), master)


def _themselves(parameters: Iterable[nn.Parameter]) -> Iterator[Shard]:
    for parameter in parameters:
        yield Shard(parameter, 0, parameter.numel(), _copies(None, parameter), parameter)


def _fp32(optimizer: Any) -> Iterator[Shard]:
    """FP32Optimizer: the parameter is its own master."""
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            yield _whole(parameter, parameter, optimizer)


def _float16(optimizer: Any) -> Iterator[Shard]:
    """Float16OptimizerWithFloat16Params: fp32 copies of 16-bit parameters; fp32 ones are their own."""
    for models, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        for parameter, master in zip(models, masters, strict=True):
            yield _whole(parameter, master, optimizer)
    for models in optimizer.fp32_from_fp32_groups:
        for parameter in models:
            yield _whole(parameter, parameter, optimizer)


def _distributed(optimizer: Any) -> Iterator[Shard]:
    """DistributedOptimizer: flat slices, paired group by group with the parameters they belong to."""
    pairs: Sequence[tuple[list[Any], list[Any], list[Any]]] = [
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups, optimizer.shard_fp32_groups),
        (
            optimizer.model_float16_groups,
            optimizer.shard_fp32_from_float16_groups,
            optimizer.shard_float16_groups,
        ),
    ]
    for model_groups, master_groups, model_shard_groups in pairs:
        for group in zip(model_groups, master_groups, model_shard_groups, strict=True):
            for parameter, master, model_shard in zip(*group, strict=True):
                span = optimizer._get_model_param_range_map(parameter)["param"]
                key = model_shard if master is None else master
                precision_aware = master is None and not is_offloaded(optimizer.optimizer)
                masters = (_in_state if precision_aware else _copies)(optimizer.optimizer, key)
                yield Shard(parameter, span.start, span.end, masters, key)


def _copies(inner: Any, master: Tensor) -> Callable[[], list[Tensor]]:
    """The master itself and, with a CPU-offloaded optimizer, the copies of it that its sub-optimizers step."""
    if not is_offloaded(inner):
        return lambda: [master]

    def tensors() -> list[Tensor]:
        copies = (inner.gpu_params_map_cpu_copy.get(master), inner.param_to_fp32_param.get(master))
        return [master, *{id(copy): copy for copy in copies if copy is not None}.values()]

    return tensors


def _in_state(inner: Any, model_shard: Tensor) -> Callable[[], list[Tensor]]:
    """Precision-aware optimizer: 16-bit model bits, and the master (or its int16 remainder) in the state.

    The state is made before the first step, as FusedAdam's own step would, so that there is a master to
    save. Source: transformer_engine/pytorch/optimizers/fused_adam.py, `initialize_state`.
    """

    def tensors() -> list[Tensor]:
        if not inner.state.get(model_shard):
            remainders = inner.store_param_remainders and model_shard.dtype == torch.bfloat16
            inner.initialize_state(model_shard, remainders)
        return [model_shard, inner.state[model_shard]["master_param"]]

    return tensors


_RESOLVERS: dict[str, Callable[[Any], Iterator[Shard]]] = {
    "DistributedOptimizer": _distributed,
    "Float16OptimizerWithFloat16Params": _float16,
    "FP32Optimizer": _fp32,
}
