"""The frozen start model of a KL penalty: its weights, kept once, and swapped in for a forward."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.training.checkpointing import load_checkpoint
from torch import Tensor, nn


class ReferenceWeights:
    """A copy of this rank's parameters, beside them or, with `offload`, on the host.

    Values are copied in place: parameters may be views of Megatron's buffers. While they are swapped in, the
    model's own are on the host if the reference is offloaded.
    """

    def __init__(self, model: Sequence[nn.Module], *, offload: bool) -> None:
        self._model = model
        self._offload = offload
        self._weights = _copy(model, to_host=offload)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the reference weights inside the block, and its own, bit for bit, after it."""
        own = _copy(self._model, to_host=self._offload)
        _set_weights(self._model, self._weights)
        try:
            yield
        finally:
            _set_weights(self._model, own)


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
    own = _copy(model, to_host=True)
    with _namespace_kept(args):
        args.load, args.finetune, args.no_load_optim = None, True, True
        load_checkpoint(list(model), None, None)
    reference = ReferenceWeights(model, offload=offload)
    _set_weights(model, own)
    return reference


@contextmanager
def _namespace_kept(args: Namespace) -> Iterator[None]:
    before: dict[str, Any] = dict(vars(args))
    try:
        yield
    finally:
        vars(args).clear()
        vars(args).update(before)


def _copy(model: Sequence[nn.Module], *, to_host: bool) -> list[Tensor]:
    parameters = [p.detach() for chunk in model for p in chunk.parameters()]
    return [p.to("cpu", copy=True) if to_host else p.clone() for p in parameters]


@torch.no_grad()
def _set_weights(model: Sequence[nn.Module], weights: Sequence[Tensor]) -> None:
    parameters = [p for chunk in model for p in chunk.parameters()]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
