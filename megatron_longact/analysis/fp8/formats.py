"""What Transformer Engine's FP8 recipes keep of a tensor: quantised to e4m3 and back, in fp32. Pure.

Scales as its recipes make them by default (transformer_engine/common/recipe): of a tensor `MOST / amax`, of blocks a
power of two at most that. Shape letters: t tokens, r rows of a weight, h their width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Literal["bf16", "tensorwise", "delayed", "blockwise", "mxfp8"]
"""bf16: no FP8. tensorwise: a scale a tensor, from the tensor itself; delayed: from those before it; blockwise: a scale
for 128 elements of a token, and for 128 x 128 of a weight; mxfp8: for 32 elements of either."""
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

MOST = 448.0
"""Largest e4m3 number; what is beyond becomes it."""
BLOCK, MX_BLOCK = 128, 32


def quantize_input(x: Tensor, recipe: Recipe, *, amax: float = 0.0) -> Tensor:
    """Activations [t, h]; amax: for delayed, the largest magnitude of those before, 0 if there were none."""
    if recipe == "bf16":
        return x.bfloat16().float()
    if recipe == "delayed":
        return _through_e4m3(x, torch.tensor(MOST / amax if amax else 1.0))
    if recipe == "tensorwise":
        return _through_e4m3(x, _scale(x.abs().amax()))
    return _in_blocks(x, rows=1, columns=BLOCK if recipe == "blockwise" else MX_BLOCK)


def quantize_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """A whole weight [r, h], as the GPU has it: fused ones together."""
    if recipe == "bf16":
        return weight.bfloat16().float()
    if recipe in ("tensorwise", "delayed"):
        return _through_e4m3(weight, _scale(weight.abs().amax()))
    blockwise = recipe == "blockwise"
    return _in_blocks(weight, rows=BLOCK if blockwise else 1, columns=BLOCK if blockwise else MX_BLOCK)


def _in_blocks(x: Tensor, *, rows: int, columns: int) -> Tensor:
    r, h = x.shape
    padded = F.pad(x, (0, -h % columns, 0, -r % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [R, rows, H, columns]
    scale = _scale(blocks.abs().amax((1, 3), keepdim=True))
    kept = _through_e4m3(blocks, torch.exp2(torch.floor(torch.log2(scale))))
    return kept.flatten(2).flatten(0, 1)[:r, :h]


def _scale(amax: Tensor) -> Tensor:
    return torch.where(amax > 0, MOST / amax.float(), 1.0)


def _through_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn).float() / scale
