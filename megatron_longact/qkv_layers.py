"""The self-attention layers of a Megatron model that LongAct works on, and where they stand in the whole model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from torch import Tensor, nn

from megatron_longact.masked_update import FrozenRows, RowIndex, Shard, add_gradient_rows
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.refusals import check_linear_qkv
from megatron_longact.selection import QK, ModelGroups

_LEFT_OUT = {"mtp", "vision_model", "vision_projection"}  # modules whose attention trains densely


@dataclass(frozen=True)
class QKVLayer:
    """One self-attention layer of this rank: Megatron's 1-based global layer number and its module."""

    layer_number: int
    attention: nn.Module

    @property
    def linear_qkv(self) -> Any:
        """The fused projection."""
        return self.attention.linear_qkv

    @property
    def weight(self) -> nn.Parameter:
        """Its weight: [rows of this shard, h]."""
        weight: nn.Parameter = self.linear_qkv.weight
        return weight

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters with a row, or an element, a channel: the weight, and the bias if any."""
        for parameter in (self.weight, getattr(self.linear_qkv, "bias", None)):
            if parameter is not None and parameter.numel() and parameter.requires_grad:
                yield parameter


@dataclass(frozen=True)
class QKVModel:
    """The layers of this rank, chunk by chunk, their common layout, and the numbers of all in the model."""

    chunks: list[nn.Module]
    layers_of_chunks: list[list[QKVLayer]]
    layout: QKVLayout
    groups: ModelGroups
    layer_numbers: list[int]
    device: torch.device

    @classmethod
    def find(cls, model_chunks: Sequence[nn.Module]) -> "QKVModel":
        """Find them; collective over pipeline ranks.

        Raises `ValueError` for a model without `linear_qkv` on any rank, with several QKV layouts, or with
        another module than Megatron's plain fused projection in its place.
        """
        chunks = unwrap_model(list(model_chunks))
        layout = QKVLayout.from_transformer_config(get_model_config(model_chunks[0]))
        groups = _groups(model_chunks[0])
        layers = [_find_layers(chunk, layout, groups.tp.size()) for chunk in chunks]
        numbers = _all_layer_numbers([layer.layer_number for chunk in layers for layer in chunk], groups)
        device = next(parameter.device for chunk in chunks for parameter in chunk.parameters())
        return cls(chunks, layers, layout, groups, numbers, device)

    @cached_property
    def layers(self) -> list[QKVLayer]:
        """The layers of this rank."""
        return [layer for chunk in self.layers_of_chunks for layer in chunk]

    @cached_property
    def has_bias(self) -> bool:
        """Whether `linear_qkv` has a bias, whose elements are rows too; also on a rank without layers."""
        config = get_model_config(self.chunks[0])
        return bool(config.add_bias_linear or config.add_qkv_bias)

    def channels(self, value: bool) -> QK:
        """A mask of all channels of the whole model: [L, np * hn] and [L, ng * hn]."""
        sizes = self.layout.num_q_channels, self.layout.num_k_channels
        return QK(*(torch.full((len(self.layer_numbers), size), value) for size in sizes))

    def frozen_rows(self, active: QK) -> FrozenRows:
        """The local rows of each parameter of this rank that are Q or K and not active; V is never frozen."""
        partition = self.layout.partition(self.groups.tp.rank(), self.groups.tp.size())
        q, k = torch.cat(active, dim=1).cpu().split([active.q.shape[1], active.k.shape[1]], dim=1)
        frozen = ~self.layout.fused(q, k, fill=True)[:, partition]  # [L, local rows]
        rows = {}
        for layer in self.layers:
            index = frozen[self.layer_numbers.index(layer.layer_number)].nonzero().flatten()
            rows.update({parameter: RowIndex(index, parameter.device) for parameter in layer.parameters})
        return rows

    def weight_norms(self) -> Tensor:
        """L2 norm of each local row of each layer's weight: fp32 [layers of this rank, local rows]."""
        norms = [torch.linalg.vector_norm(layer.weight.detach().float(), dim=1) for layer in self.layers]
        rows = self.layout.rows_per_partition(self.groups.tp.size())
        return torch.stack(norms) if norms else torch.empty(0, rows, device=self.device)

    def gradient_sums(self, shards: Iterable[Shard]) -> Tensor:
        """What this rank's shards have of the weights' gradients, row by row: squares, and how many elements.

        fp32 [2, layers of this rank, local rows]; biases are left out.
        """
        place = {layer.weight: index for index, layer in enumerate(self.layers)}
        rows = self.layout.rows_per_partition(self.groups.tp.size())
        sums = torch.zeros(2, len(place), rows, device=self.device)
        for shard in shards:
            if shard.parameter in place:
                add_gradient_rows(sums[:, place[shard.parameter]], shard)
        return sums


def _find_layers(model: nn.Module, layout: QKVLayout, tp_size: int) -> list[QKVLayer]:
    found = []
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] == "self_attention" and not _LEFT_OUT & set(parts) and hasattr(module, "linear_qkv"):
            if (own := QKVLayout.from_transformer_config(module.config)) != layout:
                raise ValueError(f"{name} has {own}, other layers {layout}; LongAct needs one QKV layout")
            check_linear_qkv(f"{name}.linear_qkv", module.linear_qkv, layout, tp_size)
            found.append(QKVLayer(int(module.layer_number), module))
    return found


def _all_layer_numbers(local: list[int], groups: ModelGroups) -> list[int]:
    stages = [local] * groups.pp.size()
    if groups.pp.size() > 1:
        dist.all_gather_object(stages, local, group=groups.pp)
    numbers = sorted(number for stage in stages for number in stage)
    if not numbers:
        raise ValueError("no rank holds a self_attention.linear_qkv: LongAct has nothing to select in this model")
    return numbers


def _groups(chunk: nn.Module) -> ModelGroups:
    try:
        collection = get_attr_wrapped_model(chunk, "pg_collection", allow_none=False)
    except RuntimeError:  # the model was built without one: Megatron's global groups
        collection = ProcessGroupCollection.use_mpu_process_groups()
    return ModelGroups.from_collection(collection)
