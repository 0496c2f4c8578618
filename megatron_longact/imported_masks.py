"""Masks in files, for `--longact-import-mask`: what `longact export-mask` writes, or another program.

Names are those of Hugging Face, `model.layers.N.self_attn.` and a projection (`AttentionLayout.hf_projections`:
`q_proj` and `k_proj`, or those of multi-latent attention), N from 0; bool, one element a row. A row that makes no
channel of Q or K (V, a latent) is True: it always trains.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_longact.attention_layout import NO_CHANNEL, AttentionLayout, Projection
from megatron_longact.config import Targets
from megatron_longact.safetensors_files import StoredTensor, read_header
from megatron_longact.selection import QK


def mask_name(layer_number: int, projection: str) -> str:
    """Name of the mask of a projection's rows, such as `q_proj`; layer_number: Megatron's, from 1."""
    return f"model.layers.{layer_number - 1}.self_attn.{projection}"


def rows_by_name(
    channels: Sequence[Tensor], layout: AttentionLayout, layer_number: int, *, others: bool | float
) -> Iterator[tuple[str, Tensor]]:
    """Values of one layer's channels, of Q [nq] and K [nk], as those of Hugging Face's rows; others: of no channel."""
    values = torch.cat([*channels, torch.full((1,), others, dtype=channels[0].dtype)])  # the last: of no channel
    for projection in layout.hf_projections:
        yield mask_name(layer_number, projection.name), values[projection.channels]


def read_masks(path: Path, layout: AttentionLayout, layer_numbers: Sequence[int], targets: Targets = "qk") -> QK:
    """The masks of all layers of a model: bool Q [L, nq] and K [L, nk].

    A projection that is not a target is all True, whatever the file says. Raises `ValueError` with one line: for a
    file that is none, by name for layers that it lacks or that the model lacks, for another shape, and for a frozen row
    that is none of Q or K.
    """
    if not path.is_file():
        raise ValueError(f"--longact-import-mask {path}: there is no such file")
    tensors, _ = read_header(path)
    wanted = [each for each in layout.hf_projections if _makes_targets(each, layout, targets)]
    names = {mask_name(number, each.name) for number in layer_numbers for each in wanted}
    if missing := sorted(names - tensors.keys(), key=_by_layer):
        raise ValueError(
            f"--longact-import-mask {path} has no {_some(missing)}; this model has {len(layer_numbers)} layers"
        )
    every = {mask_name(number, each.name) for number in layer_numbers for each in layout.hf_projections}
    if others := [name for name in tensors if _is_mask(name) and name not in every]:
        raise ValueError(
            f"--longact-import-mask {path} has {_some(sorted(others, key=_by_layer))}, which this model of "
            f"{len(layer_numbers)} layers has not"
        )
    sizes = layout.num_q_channels, layout.num_k_channels
    channels = torch.ones(len(layer_numbers), sum(sizes), dtype=torch.bool)
    for place, number in enumerate(layer_numbers):
        for each in wanted:
            makes = each.channels != NO_CHANNEL
            channels[place, each.channels[makes]] = _read(tensors, mask_name(number, each.name), makes)[makes]
    q, k = channels.split(sizes, dim=1)
    return QK(q if "q" in targets else torch.ones_like(q), k if "k" in targets else torch.ones_like(k))


def _makes_targets(projection: Projection, layout: AttentionLayout, targets: Targets) -> bool:
    channels = projection.channels[projection.channels != NO_CHANNEL]
    is_q = channels < layout.num_q_channels
    return bool(("q" in targets and is_q.any()) or ("k" in targets and (~is_q).any()))


def _is_mask(name: str) -> bool:
    return name.removesuffix(".weight").endswith(("_proj", "_proj_with_mqa"))


def _read(tensors: dict[str, StoredTensor], name: str, makes: Tensor) -> Tensor:
    """makes: bool [rows], whether a row makes a channel."""
    stored = tensors[name]
    if stored.dtype != torch.bool or stored.shape != makes.shape:
        kind = str(stored.dtype).removeprefix("torch.")
        raise ValueError(
            f"--longact-import-mask {stored.path}: {name} is {kind} {list(stored.shape)}, this model has bool "
            f"{list(makes.shape)}"
        )
    mask = stored.read()
    if frozen := int((~mask & ~makes).sum()):
        raise ValueError(
            f"--longact-import-mask {stored.path}: {name} freezes {frozen} rows that make no channel of Q or K; those "
            "must be True"
        )
    return mask


def _by_layer(name: str) -> tuple[int, str]:
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return (int(numbers[0]) if numbers else -1, name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
