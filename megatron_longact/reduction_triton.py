"""`Statistic.reduce` on a GPU: one kernel that reads Q and K once, and of a token that does not count nothing.

Each program reduces a stretch of tokens of some channels; a second, small reduction adds the stretches in a fixed
order, so that all runs agree bitwise. Launches do not depend on the number of tokens.
"""

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from megatron_longact.reduction_grid import CHANNELS_OF_BLOCK, TOKENS_OF_BLOCK, stretches


def reduce(x: Tensor, weights: Tensor | None, *, power: int, maximum: bool) -> Tensor:
    """See `reduction.Statistic.reduce`; the channels of x [t, runs, width] or [t, width] lie side by side.

    A maximum turns NaN into Inf.
    """
    shape = x.shape[1:]
    x = x if x.dim() == 3 else x.flatten(1)[:, None]
    tokens, runs, width = x.shape
    assert x.stride(2) == 1, "the channels of a run must lie side by side"
    if tokens == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    count, stretch = stretches(tokens, runs * width)
    parts = torch.empty(count, runs, width, dtype=torch.float32, device=x.device)
    reduce_stretches(x, weights, parts, stretch, power, maximum)
    return (parts.amax(0) if maximum else parts.sum(0)).view(shape)


@torch.library.custom_op("longact::reduce_stretches", mutates_args=("parts",))
def reduce_stretches(x: Tensor, weights: Tensor | None, parts: Tensor, stretch: int, power: int, maximum: bool) -> None:
    """The kernel's launch: x [t, runs, width] -> parts fp32 [t / stretch, runs, width]; weights: bool or fp32 [t]."""
    tokens, runs, width = x.shape
    if weights is not None:
        weights = weights.contiguous()
        weights = weights.view(torch.uint8) if weights.dtype == torch.bool else weights
    _reduce[(triton.cdiv(runs * width, CHANNELS_OF_BLOCK), parts.shape[0])](
        x,
        x if weights is None else weights,
        parts,
        tokens,
        stretch,
        x.stride(0),
        x.stride(1),
        width,
        runs * width,
        POWER=power,
        MAXIMUM=maximum,
        WEIGHTED=weights is not None,
        TOKENS=TOKENS_OF_BLOCK,
        CHANNELS=CHANNELS_OF_BLOCK,
    )


@reduce_stretches.register_fake
def _(x: Tensor, weights: Tensor | None, parts: Tensor, stretch: int, power: int, maximum: bool) -> None:
    return None


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reduce(  # type: ignore[no-untyped-def]
    x,
    weights,
    parts,
    num_tokens,
    stretch,
    token_stride,
    run_stride,
    width,
    num_channels,
    POWER: tl.constexpr,
    MAXIMUM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < num_channels
    columns = x + channels // width * run_stride + channels % width
    first = tl.program_id(1) * stretch
    total = tl.zeros([TOKENS, CHANNELS], dtype=tl.float32)
    for start in range(0, stretch, TOKENS):
        tokens = first + start + tl.arange(0, TOKENS)
        counts = tokens < num_tokens
        if WEIGHTED:
            weight = tl.load(weights + tokens, mask=counts, other=0).to(tl.float32)
            counts = counts & (weight > 0)
        rows = tokens.to(tl.int64)[:, None] * token_stride
        value = tl.load(columns[None, :] + rows, mask=counts[:, None] & there[None, :], other=0.0).to(tl.float32)
        if MAXIMUM:
            total = tl.maximum(total, tl.where(value == value, tl.abs(value), float("inf")))
        else:
            value = value * value if POWER == 2 else tl.abs(value)
            if WEIGHTED:
                value = value * weight[:, None]
            total += value
    reduced = tl.max(total, axis=0) if MAXIMUM else tl.sum(total, axis=0)
    tl.store(parts + tl.program_id(1) * num_channels + channels, reduced, mask=there)
