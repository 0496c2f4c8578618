"""The self-attention layers of a Megatron model that LongAct works on, and where they stand in the whole model.

Shape letters: L layers of the whole model, L_r of this rank, n rows of a layer on this rank, all its projections one
behind the other, nq and nk channels of Q and K.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from torch import Tensor, nn

from megatron_longact.attention_layout import AttentionLayout, ShardedLayout
from megatron_longact.config import LongActConfig
from megatron_longact.layouts import layout_of
from megatron_longact.masked_update import FrozenRows, RowIndex, Shard, add_gradient_rows
from megatron_longact.refusals import check_projection
from megatron_longact.selection import QK, GlobalSaliency, ModelGroups

_LEFT_OUT = {"mtp", "vision_model", "vision_projection"}  # modules whose attention trains densely


@dataclass(frozen=True)
class QKVLayer:
    """One self-attention layer of this rank: Megatron's 1-based global layer number and its module."""

    layer_number: int
    attention: nn.Module
    names: tuple[str, ...] = ("linear_qkv",)
    """Of the projections that make channels of Q and K."""

    @property
    def projections(self) -> list[Any]:
        """Their modules."""
        return [getattr(self.attention, name) for name in self.names]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Their weights: [rows on this rank, width] each."""
        return [projection.weight for projection in self.projections]

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters with a row, or an element, a channel: the weights, and the biases if any."""
        for name in self.names:
            yield from self.parameters_of(name)

    def parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        """Those of one projection."""
        module = getattr(self.attention, name)
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None and parameter.numel() and parameter.requires_grad:
                yield parameter


@dataclass(frozen=True)
class QKVModel:
    """The layers of this rank, chunk by chunk, their common layout, and the numbers of all in the model."""

    chunks: list[nn.Module]
    layers_of_chunks: list[list[QKVLayer]]
    layout: AttentionLayout
    groups: ModelGroups
    layer_numbers: list[int]
    device: torch.device
    whole: frozenset[str] = frozenset()
    """Projections that every tensor-parallel rank holds all of."""
    sequence_parallel: bool = False
    without: dict[int, str] = field(default_factory=dict)
    """What the layers of the whole model are, by number, that have no channel of Q or K."""

    @classmethod
    def find(cls, model_chunks: Sequence[nn.Module]) -> "QKVModel":
        """Find them; collective over pipeline ranks.

        Raises `ValueError` for a model without such projections on any rank, with several layouts of attention, or
        with other modules than Megatron's plain ones in their place.
        """
        chunks = unwrap_model(list(model_chunks))
        config, groups = get_model_config(model_chunks[0]), _groups(model_chunks[0])
        found = [list(_attentions(chunk)) for chunk in chunks]
        stage = _Stage(
            {int(module.layer_number): (name, layout) for of in found for name, module, layout in of},
            {number: kind for chunk in chunks for number, kind in _layers(chunk)},
        )
        numbers, layout, without = _whole_model(stage, groups, layout_of(config))
        names = tuple(projection.name for projection in layout.projections)
        whole = {name for of in found for at, module, own in of for name in _whole(at, module, own, groups.tp.size())}
        return cls(
            chunks=chunks,
            layers_of_chunks=[
                [QKVLayer(int(module.layer_number), module, names) for _, module, _ in of] for of in found
            ],
            layout=layout,
            groups=groups,
            layer_numbers=numbers,
            device=next(parameter.device for chunk in chunks for parameter in chunk.parameters()),
            whole=frozenset(whole),
            sequence_parallel=bool(config.sequence_parallel) and groups.tp.size() > 1,
            without=without,
        )

    @cached_property
    def layers(self) -> list[QKVLayer]:
        """The layers of this rank."""
        return [layer for chunk in self.layers_of_chunks for layer in chunk]

    @cached_property
    def has_bias(self) -> bool:
        """Whether the projections have a bias, whose elements are rows too; also on a rank without layers."""
        config = get_model_config(self.chunks[0])
        return self.layout.has_biases and bool(config.add_bias_linear or config.add_qkv_bias)

    @cached_property
    def sharded(self) -> ShardedLayout:
        """The layout as tensor-parallel ranks hold it."""
        return ShardedLayout(self.layout, self.groups.tp.size(), self.whole, self.sequence_parallel)

    def global_saliency(self, config: LongActConfig) -> GlobalSaliency:
        """What turns the sums of this rank's layers into the saliency of the whole model."""
        places = self._places
        return GlobalSaliency(self.groups, self.sharded, config, num_layers=len(self.layer_numbers), places=places)

    def channels(self, value: bool) -> QK:
        """A mask of all channels of the whole model: [L, nq] and [L, nk]."""
        sizes = self.layout.num_q_channels, self.layout.num_k_channels
        return QK(*(torch.full((len(self.layer_numbers), size), value) for size in sizes))

    def frozen_rows(self, active: QK) -> FrozenRows:
        """The local rows of each parameter of this rank that are Q or K and not active; no other row is ever frozen."""
        moves = torch.cat([*active, torch.ones_like(active.q[:, :1])], dim=1)  # the last is that of no channel
        frozen = ~moves.cpu()[:, self.sharded.channels(self.groups.tp.rank())][self._places]  # [L_r, n]
        columns = self.sharded.columns
        sizes = torch.stack([frozen[:, part].sum(1) for part in columns.values()], dim=1).flatten().tolist()
        row_of = torch.cat([torch.arange(part.stop - part.start) for part in columns.values()])  # of its projection
        host = row_of[frozen.nonzero()[:, 1]]
        parts = zip(host.split(sizes), host.to(self.device).split(sizes), strict=True)  # one copy, not one a layer
        rows = {}
        for layer in self.layers:
            for name in columns:
                of_host, of_device = next(parts)
                index = RowIndex(of_host, self.device, copy=of_device)
                rows.update(dict.fromkeys(layer.parameters_of(name), index))
        return rows

    @cached_property
    def _places(self) -> list[int]:
        """Where this rank's layers stand among those of the whole model."""
        return [self.layer_numbers.index(layer.layer_number) for layer in self.layers]

    def of_rows(self, value: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """A value for each row of each weight, from [rows] of one weight; [L_r, n]."""
        values = [torch.cat([value(weight) for weight in layer.weights]) for layer in self.layers]
        return torch.stack(values) if values else torch.empty(0, self.sharded.num_rows, device=self.device)

    def weight_norms(self) -> Tensor:
        """L2 norm of each local row of each layer's weights: fp32 [L_r, n]."""
        return self.of_rows(lambda weight: torch.linalg.vector_norm(weight.detach().float(), dim=1))

    def gradient_sums(self, shards: Iterable[Shard]) -> Tensor:
        """What this rank's shards have of the weights' gradients, row by row: squares, and how many elements.

        fp32 [2, L_r, n]; biases are left out.
        """
        sums = torch.zeros(2, len(self.layers), self.sharded.num_rows, device=self.device)
        places = {
            weight: sums[:, index, columns]
            for index, layer in enumerate(self.layers)
            for weight, columns in zip(layer.weights, self.sharded.columns.values(), strict=True)
        }
        for shard in shards:
            if shard.parameter in places:
                add_gradient_rows(places[shard.parameter], shard)
        return sums

    def counted(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those that a sum over all tensor-parallel ranks has once: without other ranks' copies of whole weights."""
        copies = {
            parameter
            for layer in self.layers
            if self.groups.tp.rank()
            for name in self.whole
            for parameter in layer.parameters_of(name)
        }
        return [shard for shard in shards if shard.parameter not in copies]


def left_out(without: dict[int, str], *, of: int) -> str:
    """What is said of the layers that have no channel of Q or K."""
    kinds = {kind: [str(number) for number, other in without.items() if other == kind] for kind in without.values()}
    named = "; ".join(f"{kind} {', '.join(numbers)}" for kind, numbers in kinds.items())
    return f"LongAct leaves out {len(without)} of {of} layers, which have no query and key projections: {named}"


@dataclass(frozen=True)
class _Stage:
    """Layers of a pipeline stage, by Megatron's number."""

    with_qk: dict[int, tuple[str, AttentionLayout]]
    """Those with channels of Q and K: the name and layout of their attention."""
    kinds: dict[int, str]
    """What all of them are."""


def _attentions(model: nn.Module) -> Iterator[tuple[str, Any, AttentionLayout]]:
    """The attention modules that make channels of Q and K: their names and layouts."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] == "self_attention" and not _LEFT_OUT & set(parts) and hasattr(module, "config"):
            layout = layout_of(module.config, module)
            if any(hasattr(module, projection.name) for projection in layout.projections):
                yield name, module, layout


def _layers(model: nn.Module) -> Iterator[tuple[int, str]]:
    """The layers of the decoder, by Megatron's number, and what they are."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-2:-1] == ["layers"] and not _LEFT_OUT & set(parts) and hasattr(module, "layer_number"):
            mixer = getattr(module, "self_attention", None)
            yield int(module.layer_number), type(module if isinstance(mixer, IdentityOp | None) else mixer).__name__


def _whole_model(
    stage: _Stage, groups: ModelGroups, expected: AttentionLayout
) -> tuple[list[int], AttentionLayout, dict[int, str]]:
    """Numbers of all layers with Q and K, their layout, and what the other layers are; alike on all ranks."""
    stages = [stage] * groups.pp.size()
    if groups.pp.size() > 1:
        dist.all_gather_object(stages, stage, group=groups.pp)
    with_qk = {number: found for each in stages for number, found in sorted(each.with_qk.items())}
    if not with_qk:
        names = " or ".join(f"self_attention.{projection.name}" for projection in expected.projections)
        raise ValueError(f"no rank holds a {names}: LongAct has nothing to select in this model")
    first = next(iter(with_qk.values()))[1]
    for name, layout in with_qk.values():
        if layout != first:
            raise ValueError(f"{name} has {layout}, other layers {first}; LongAct needs one layout of attention")
    kinds = {number: kind for each in stages for number, kind in each.kinds.items() if number not in with_qk}
    return sorted(with_qk), first, dict(sorted(kinds.items()))


def _whole(name: str, attention: Any, layout: AttentionLayout, tp_size: int) -> list[str]:
    """The projections of a layer that every tensor-parallel rank holds all of."""
    return [
        projection.name
        for projection in layout.projections
        if check_projection(f"{name}.{projection.name}", getattr(attention, projection.name), projection, tp_size)
    ]


def _groups(chunk: nn.Module) -> ModelGroups:
    try:
        collection = get_attr_wrapped_model(chunk, "pg_collection", allow_none=False)
    except RuntimeError:  # the model was built without one: Megatron's global groups
        collection = ProcessGroupCollection.use_mpu_process_groups()
    return ModelGroups.from_collection(collection)
