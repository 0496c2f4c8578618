"""LongAct's masks and saliency out of a Megatron checkpoint, under Hugging Face names.

For layer N, counted from 0, and proj `q_proj` or `k_proj`, or with multi-latent attention `q_b_proj` (without a latent
of Q `q_proj`), `kv_b_proj` or `kv_a_proj_with_mqa`, a mask file holds

    model.layers.N.self_attn.<proj>            bool [rows]: True where LongAct updates the row
    model.layers.N.self_attn.<proj>.saliency   fp32 [rows]: the channel's saliency, where it was measured

`rows` are those of `model.layers.N.self_attn.<proj>.weight`, in its order. Rows of V and of a latent are True, and have
no saliency: NaN. With multi-latent attention the order is that of checkpoints whose RoPE pairs are neighbours
(`rope_interleave`, as DeepSeek's have them), which is Megatron's own. The file's metadata says which update the
masks are of, LongAct's configuration, and the layout of an attention layer.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longact.conversion.torch_dist import iteration_folder, read_common_state
from megatron_longact.imported_masks import rows_by_name
from megatron_longact.layouts import layout_from_saved
from megatron_longact.safetensors_files import SafetensorsWriter


def export(load: Path, save: Path, *, ckpt_step: int | None = None, union: bool = False) -> str:
    """Write the masks of a checkpoint into the safetensors file `save`; what was written, in a line.

    union: those of all steps together, which the RL program counts, instead of the last one. Raises `ValueError` with
    one line for a checkpoint without LongAct, without a mask yet, or without that count.
    """
    folder = iteration_folder(load, ckpt_step)
    states = read_common_state(folder).get("opt_param_scheduler") or {}
    state = states.get("longact")
    if state is None:
        raise ValueError(f"{folder} holds no LongAct state: the run that saved it had no --longact, or no optimizer")
    if state["masks"] is None:
        raise ValueError(
            f"{folder} has no mask yet: it was saved after update {state['updates']}, before the first mask"
        )
    if not layout_from_saved(state["layout"]).hf_mapped:
        raise ValueError(f"{folder} is of a model with --attention-output-gate, whose rows are not mapped")
    if union:
        state = {**state, "masks": _union(states, folder), "saliency": None}
    written = dict(tensors(state))
    _write(save, written, metadata(state))
    shares = {part: float(state["masks"][part].float().mean()) for part in ("q", "k")}
    when = f"{'until' if union else 'after'} update {state['updates']}"
    return (
        f"{save}: masks {when}, {len(state['layer_numbers'])} layers; updated are "
        f"{shares['q']:.1%} of the Q rows, {shares['k']:.1%} of the K rows"
    )


def _union(states: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Rows that some mask of the run let through, bool [L, nq] and [L, nk], as `rl/audit.py` counts them."""
    rows = (states.get("rl") or {}).get("rows")
    if rows is None or rows["since"]:
        raise ValueError(
            f"{folder} does not say which rows were updated since the run began: the RL program counts them"
        )
    active: dict[str, Tensor] = rows["active"]
    return active


def tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What a mask file holds of a `LongAct.state_dict()` with masks."""
    layout = layout_from_saved(state["layout"])
    for place, number in enumerate(state["layer_numbers"]):
        masks = [state["masks"][part][place].to(torch.bool) for part in ("q", "k")]
        yield from rows_by_name(masks, layout, number, others=True)
        if state["saliency"] is not None:
            scores = [state["saliency"][part][place].float() for part in ("q", "k")]
            for name, values in rows_by_name(scores, layout, number, others=torch.nan):
                yield f"{name}.saliency", values


def metadata(state: dict[str, Any]) -> dict[str, str]:
    """What a mask file says of itself."""
    numbers = {name: str(state[name]) for name in ("updates", "refreshes")}
    described = {f"longact_{name}": json.dumps(state[name], sort_keys=True) for name in ("config", "layout")}
    return {"format": "pt", **described, **numbers}


def _write(save: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = save.with_name(save.name + ".partial")
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        save.parent.mkdir(parents=True, exist_ok=True)
        with SafetensorsWriter(partial, shapes, metadata=metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        os.replace(partial, save)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"cannot write {save}: {error.strerror or error}") from error
