"""Values of one table entry: Hugging Face's tensors as Megatron's, and back. Shape letters as in `qkv_layout`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.conversion.mapping import Entry, HFTensor, padded_vocab_size


def megatron_parts(
    entry: Entry, model: HFModel, read: Callable[[HFTensor], Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, str]]:
    """Parts of the Megatron tensor, each with its first row and what it is made from, one at a time.

    read: the values of a Hugging Face tensor; asked for one at a time, none is kept.
    """
    if entry.layout == "qkv":
        yield 0, _fused_qkv(entry, model, read, dtype), entry.hf[0].name
        return
    row = 0
    for tensor in entry.hf:
        yield row, read(tensor), tensor.name
        row += tensor.shape[0]
    if entry.layout == "vocab" and (padding := padded_vocab_size(model) - row):
        yield row, torch.zeros(padding, *entry.shape[1:], dtype=dtype), f"the padding of {entry.hf[0].name}"


def _fused_qkv(entry: Entry, model: HFModel, read: Callable[[HFTensor], Tensor], dtype: torch.dtype) -> Tensor:
    fused = torch.empty(entry.shape, dtype=dtype)
    by_group = fused.view(model.num_query_groups, -1, *entry.shape[1:])  # [ng, (np / ng + 2) * hn, (h)]
    start = 0
    for tensor in entry.hf:
        rows = tensor.shape[0] // model.num_query_groups
        by_group[:, start : start + rows] = read(tensor).view(model.num_query_groups, rows, *tensor.shape[1:])
        start += rows
    return fused


def hf_parts(entry: Entry, model: HFModel, values: Tensor) -> Iterator[tuple[HFTensor, Tensor]]:
    """The Hugging Face tensors of an entry, from its part of the Megatron tensor, one at a time."""
    start = 0
    by_group = values.view(model.num_query_groups, -1, *entry.shape[1:]) if entry.layout == "qkv" else values
    for tensor in entry.hf:
        if entry.layout == "qkv":
            rows = tensor.shape[0] // model.num_query_groups
            yield tensor, by_group[:, start : start + rows].reshape(tensor.shape)
        else:
            rows = tensor.shape[0]
            yield tensor, values[start : start + rows]
        start += rows
