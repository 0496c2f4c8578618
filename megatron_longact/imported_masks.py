"""Masks from a file, for `--longact-import-mask`: what `longact export-mask` writes, or another program.

Names are those of Hugging Face: `model.layers.N.self_attn.q_proj` and `.k_proj`, N from 0, bool, one element a row.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_longact.config import Targets
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.safetensors_files import StoredTensor, read_header
from megatron_longact.selection import QK


def mask_name(layer_number: int, part: str) -> str:
    """Name of the mask of Q ("q") or K ("k") of a layer; layer_number: Megatron's, from 1."""
    return f"model.layers.{layer_number - 1}.self_attn.{part}_proj"


def read_masks(path: Path, layout: QKVLayout, layer_numbers: Sequence[int], targets: Targets = "qk") -> QK:
    """The masks of all layers of a model: bool Q [L, np * hn] and K [L, ng * hn].

    A projection that is not a target is all True, whatever the file says. Raises `ValueError` with one line: for a
    file that is none, by name for layers that it lacks or that the model lacks, and for another shape.
    """
    if not path.is_file():
        raise ValueError(f"--longact-import-mask {path}: there is no such file")
    tensors, _ = read_header(path)
    wanted = {"q": layout.num_q_channels, "k": layout.num_k_channels}
    names = {mask_name(number, part) for number in layer_numbers for part in targets}
    if missing := sorted(names - tensors.keys(), key=_by_layer):
        raise ValueError(
            f"--longact-import-mask {path} has no {_some(missing)}; this model has {len(layer_numbers)} layers"
        )
    every = {mask_name(number, part) for number in layer_numbers for part in wanted}
    masks = [name for name, tensor in tensors.items() if name.endswith(("_proj", "_proj.weight")) and name not in every]
    if masks:
        raise ValueError(
            f"--longact-import-mask {path} has {_some(sorted(masks, key=_by_layer))}, which this model of "
            f"{len(layer_numbers)} layers has not"
        )
    return QK(
        *(
            torch.stack([_read(tensors, mask_name(number, part), rows) for number in layer_numbers])
            if part in targets
            else torch.ones(len(layer_numbers), rows, dtype=torch.bool)
            for part, rows in wanted.items()
        )
    )


def _read(tensors: dict[str, StoredTensor], name: str, rows: int) -> Tensor:
    stored = tensors[name]
    if stored.dtype != torch.bool or stored.shape != (rows,):
        kind = str(stored.dtype).removeprefix("torch.")
        raise ValueError(
            f"--longact-import-mask {stored.path}: {name} is {kind} {list(stored.shape)}, this model has bool [{rows}]"
        )
    return stored.read()


def _by_layer(name: str) -> tuple[int, str]:
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return (int(numbers[0]) if numbers else -1, name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
