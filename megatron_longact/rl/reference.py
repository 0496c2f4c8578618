"""The frozen start model of a KL penalty: its weights, kept once, and swapped in for a forward.

What is kept of a parameter is what its values rest on, bit for bit. Transformer Engine keeps a weight in FP8 as
several tensors (data, inverse scales, a transpose or a second quantisation along columns); its `clone()` shares the
scales, which Megatron rewrites in each step, and `copy_` may quantise anew. So those tensors are taken one by one.
Source: transformer_engine/pytorch/quantized_tensor.py, `QuantizedTensorStorage` (TE 2).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training.checkpointing import load_checkpoint
from torch import Tensor, nn

Parts = list[Tensor | None]
"""The tensors that hold a weight: itself, or those that Transformer Engine makes one of; None for what is not there."""


@dataclass(frozen=True)
class Kept:
    """A copy of a weight's parts, and whether Transformer Engine holds its transpose for outdated."""

    parts: Parts
    transpose_invalid: bool | None


class ReferenceWeights:
    """A copy of this rank's parameters and saved buffers, beside them or, with `offload`, on the host.

    Values are copied in place: parameters may be views of Megatron's buffers. While they are swapped in, the
    model's own are on the host if the reference is offloaded.
    """

    def __init__(self, model: Sequence[nn.Module], *, offload: bool) -> None:
        """Raises `ValueError` for a quantised weight of which we do not know how to copy every bit."""
        self._model = model
        self._offload = offload
        self._weights = [_keep(weight, to_host=offload) for weight in _weights(model)]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the reference weights inside the block, and its own, bit for bit, after it."""
        with _own_weights_kept(self._model, to_host=self._offload):
            for weight, kept in zip(_weights(self._model), self._weights, strict=True):
                _put(weight, kept, into=_parts(weight))
            _outdate_workspaces(self._model)
            yield


def start_reference(model: Sequence[nn.Module], args: Namespace, *, offload: bool) -> ReferenceWeights:
    """The weights that training started from, whether this run starts now or is resumed.

    A resumed run loads them from `--pretrained-checkpoint` once more and keeps its own. Raises
    ValueError if a resumed run has no such checkpoint.
    """
    if args.iteration == 0:
        return ReferenceWeights(model, offload=offload)
    if args.pretrained_checkpoint is None:
        raise ValueError(
            "a resumed run with --grpo-kl-beta > 0 needs --pretrained-checkpoint: the reference "
            "weights of the KL penalty are those that training started from"
        )
    with _own_weights_kept(model, to_host=True), _extra_states_kept(model), _namespace_kept(args):
        args.load, args.finetune, args.no_load_optim = None, True, True
        load_checkpoint(list(model), None, None)
        return ReferenceWeights(model, offload=offload)


@contextmanager
def _own_weights_kept(model: Sequence[nn.Module], *, to_host: bool) -> Iterator[None]:
    own = [(weight, _parts(weight), _keep(weight, to_host=to_host)) for weight in _weights(model)]
    try:
        yield
    finally:
        for weight, parts, kept in own:
            _put(weight, kept, into=parts if _is_quantized(weight) else _parts(weight))
        _outdate_workspaces(model)


@contextmanager
def _extra_states_kept(model: Sequence[nn.Module]) -> Iterator[None]:
    """Transformer Engine's scales of activations and gradients, which a checkpoint holds beside the weights."""
    modules = [module for chunk in model for module in chunk.modules() if _has_extra_state(module)]
    states = [module.get_extra_state() for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, states, strict=True):
            module.set_extra_state(state)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


@contextmanager
def _namespace_kept(args: Namespace) -> Iterator[None]:
    before: dict[str, Any] = dict(vars(args))
    try:
        yield
    finally:
        vars(args).clear()
        vars(args).update(before)


def _weights(model: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters, and the buffers that a checkpoint holds: a router's expert bias is one."""
    weights: list[Tensor] = [parameter for chunk in model for parameter in chunk.parameters()]
    for module in (module for chunk in model for module in chunk.modules()):
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        weights += [buffer for name, buffer in module.named_buffers(recurse=False) if name in saved]
    return weights


def _is_quantized(weight: Tensor) -> bool:
    """Whether Transformer Engine keeps it in FP8 or FP4."""
    return hasattr(weight, "prepare_for_saving")


def _parts(weight: Any) -> Parts:
    """The tensors that hold it now; raises `ValueError` for a class of which we do not know them."""
    if _is_quantized(weight):
        parts, emptied = weight.prepare_for_saving()
        emptied.restore_from_saved(list(parts))
        return list(parts)
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"--grpo-kl-beta does not work with weights that are kept as {type(weight).__name__}: LongAct does not "
            "know which tensors hold them; it knows those of Transformer Engine 2"
        )
    return [weight.detach()]


def _keep(weight: Tensor, *, to_host: bool) -> Kept:
    def copy(part: Tensor | None) -> Tensor | None:
        return part if part is None else part.to("cpu" if to_host else part.device, copy=True)

    return Kept([copy(part) for part in _parts(weight)], getattr(weight, "_transpose_invalid", None))


@torch.no_grad()
def _put(weight: Any, kept: Kept, *, into: Parts) -> None:
    """Give a weight the values that were kept, in the tensors `into`; those without a value are taken off."""
    filled: Parts = []
    for part, value in zip(into, kept.parts, strict=True):
        if part is not None and value is not None:
            part.copy_(value)
            filled.append(part)
        else:
            filled.append(value if value is None else value.to(weight.device, copy=True))
    if _is_quantized(weight):
        weight.restore_from_saved(filled)
        if kept.transpose_invalid is not None:
            weight._transpose_invalid = kept.transpose_invalid


def _outdate_workspaces(model: Sequence[nn.Module]) -> None:
    """Transformer Engine quantises bf16 weights once for several forwards: let the next one do it anew."""
    modules: list[Any] = [module for chunk in model for module in chunk.modules()]
    for module in modules:
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True
