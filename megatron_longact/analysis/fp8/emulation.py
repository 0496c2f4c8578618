"""A Hugging Face model that computes as Transformer Engine would in FP8, as far as `formats` knows.

Weights and inputs of the linear layers are quantised and multiplied in fp32, outputs rounded to bf16. Norms,
attention, the residual stream and the output layer stay in fp32. Weights that a GPU has fused, Q with K and V and gate
with up, are quantised together, in the order of Megatron's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_longact.analysis.activations.hf import HFSource
from megatron_longact.analysis.fp8.formats import Recipe, quantize_input, quantize_weight
from megatron_longact.qkv_layout import QKVLayout

Linears = Literal["qkv", "all"]
"""Which linear layers: those that make Q, K and V alone, or all of the transformer layers."""


@contextmanager
def emulated(source: HFSource, recipe: Recipe, *, linears: Linears = "all") -> Iterator[None]:
    """The model under a recipe; its weights are what they were afterwards, bit by bit."""
    with torch.no_grad(), ExitStack() as stack:
        for parts, rows in _groups(source, linears):
            _quantize_together([part.weight for part in parts], rows, recipe, stack)
            for part in parts:
                _hook(part, recipe, stack)
        yield


def _groups(source: HFSource, linears: Linears) -> Iterator[tuple[list[nn.Linear], Tensor | None]]:
    """Linear layers that a GPU has fused, and where each of their rows stands then; None: one behind the other."""
    if not isinstance(source.layout, QKVLayout):
        raise ValueError(f"{source.name} has multi-latent attention; FP8 is emulated for q_proj, k_proj and v_proj")
    fused = _fused_places(source.layout)
    taken: set[nn.Module] = set()
    for attention in source.attentions:
        parts = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        taken.update(parts)
        yield parts, fused
    if linears == "qkv":
        return
    for module in source.model.base_model.modules():
        pair = [getattr(module, name, None) for name in ("gate_proj", "up_proj")]
        if all(isinstance(part, nn.Linear) for part in pair):
            taken.update(pair)  # type: ignore[arg-type]
            yield pair, None  # type: ignore[misc]
    for module in source.model.base_model.modules():
        if isinstance(module, nn.Linear) and module not in taken:
            yield [module], None


def _fused_places(layout: QKVLayout) -> Tensor:
    """Of [Q; K; V], head by head, the row of the fused weight: int64 [rows]."""
    rows = layout.q_rows.numel() + 2 * layout.k_rows.numel()
    is_qk = torch.zeros(rows, dtype=torch.bool)
    is_qk[layout.q_rows] = is_qk[layout.k_rows] = True
    return torch.cat([layout.q_rows, layout.k_rows, (~is_qk).nonzero().flatten()])


def _quantize_together(weights: list[Tensor], rows: Tensor | None, recipe: Recipe, stack: ExitStack) -> None:
    whole = torch.cat([weight.detach() for weight in weights])
    order = torch.arange(len(whole)) if rows is None else rows
    fused = torch.empty_like(whole)
    fused[order] = whole
    kept = quantize_weight(fused.float(), recipe)[order]
    for weight, new in zip(weights, kept.split([len(weight) for weight in weights]), strict=True):
        stack.callback(weight.copy_, weight.detach().clone())
        weight.copy_(new)


def _hook(linear: nn.Linear, recipe: Recipe, stack: ExitStack) -> None:
    amax = 0.0

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal amax
        x = args[0]
        kept = quantize_input(x.flatten(0, -2), recipe, amax=amax).view_as(x)
        amax = max(amax, float(x.abs().amax())) if recipe == "delayed" else 0.0
        return (kept.to(x.dtype), *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.bfloat16().to(output.dtype)

    for handle in (linear.register_forward_pre_hook(enter), linear.register_forward_hook(leave)):
        stack.callback(handle.remove)
