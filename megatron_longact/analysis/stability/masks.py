"""Masks that runs made themselves: out of checkpoints with LongAct's state, or files of `longact export-mask`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_longact.analysis.activations.checkpoints import run_names
from megatron_longact.analysis.stability.overlap import Choice
from megatron_longact.conversion.torch_dist import iteration_folder, read_common_state
from megatron_longact.imported_masks import read_masks
from megatron_longact.layouts import layout_from_saved
from megatron_longact.mask_history import MaskHistory
from megatron_longact.safetensors_files import read_header
from megatron_longact.selection import QK

_LAYER = re.compile(r"model\.layers\.(\d+)\.self_attn\.")
_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qk])_proj")


def read_choices(paths: list[Path]) -> tuple[list[Choice], tuple[int, ...]]:
    """The masks in all paths, and the layers they are of, from 0.

    A path is a mask file, a checkpoint folder, of which every iteration with a mask is taken, or one iteration's
    folder. Raises `ValueError` for a path without a mask, and if the layers are not the same.
    """
    found: list[tuple[Choice, tuple[int, ...]]] = []
    for path, name in zip(paths, run_names([_named_by(path) for path in paths]), strict=True):
        found += _of_file(path, name) if path.is_file() else _of_folder(path, name)
    layers = {numbers for _, numbers in found}
    if len(layers) != 1:
        raise ValueError(f"--masks are of different layers: {sorted(layers)}")
    return [choice for choice, _ in found], layers.pop()


def _named_by(path: Path) -> Path:
    if path.is_file():
        return path.with_suffix("")
    return path.parent if _iterations(path) == [path] else path


def _iterations(path: Path) -> list[Path]:
    return sorted(each for each in path.glob("iter_*") if each.is_dir()) or [iteration_folder(path)]


def _of_file(path: Path, name: str) -> Iterator[tuple[Choice, tuple[int, ...]]]:
    stored, metadata = read_header(path)
    if saved := metadata.get("longact_layout"):
        numbers = sorted({int(match[1]) for name in stored if (match := _LAYER.match(name))})
        masks = read_masks(path, layout_from_saved(json.loads(saved)), [number + 1 for number in numbers])
        yield Choice(name, masks), tuple(numbers)
        return
    tensors = {match.groups(): t for name, t in stored.items() if (match := _NAME.fullmatch(name))}
    layers = sorted({int(layer) for layer, _ in tensors})
    missing = [f"layer {layer} {part}" for layer in layers for part in "qk" if (str(layer), part) not in tensors]
    if not layers or missing:
        raise ValueError(f"--masks {path} holds no mask for {missing[0] if missing else 'any layer'}")
    parts = (torch.stack([tensors[str(layer), part].read().bool() for layer in layers]) for part in "qk")
    yield Choice(name, QK(*parts)), tuple(layers)


def _of_folder(path: Path, run: str) -> Iterator[tuple[Choice, tuple[int, ...]]]:
    folders = _iterations(path)
    none = True
    for folder in folders:
        state = (read_common_state(folder).get("opt_param_scheduler") or {}).get("longact")
        if state is not None and state["masks"] is not None:
            none = False
            masks = QK(*(state["masks"][part].bool() for part in ("q", "k")))
            number = folder.name.removeprefix("iter_").lstrip("0") or "0"
            known = state.get("history")
            history = MaskHistory.from_state_dict(known, torch.device("cpu")) if known else None
            choice = Choice(f"{run} {number}", masks, run=run, history=history)
            yield choice, tuple(number - 1 for number in state["layer_numbers"])
    if none:
        raise ValueError(f"--masks {path}: none of its checkpoints holds a mask of LongAct")
