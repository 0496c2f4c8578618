"""`saliency.reduce_tokens` as one Triton kernel: Q and K are read once, tokens that do not count are not read at all.

LongAct does not use it yet: tools/benchmark_capture.py measures it beside the others. Each program reduces a stretch of
tokens of some channels; a second, small reduction adds the stretches in a fixed order, so that all runs agree bitwise.
"""

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from megatron_longact.config import Statistic

_TOKENS, _CHANNELS = 32, 128  # of a block that a program holds in registers
_PROGRAMS = 1024  # about so many, whatever the sizes: enough for the largest GPUs


def reduce_by_triton(x: Tensor, counted: Tensor | None, *, statistic: Statistic) -> Tensor:
    """See `saliency.reduce_tokens`; x [t, runs, width], a run's channels side by side. A maximum turns NaN into Inf."""
    tokens, runs, width = x.shape
    assert x.stride(2) == 1, "the channels of a run must lie side by side"
    blocks = triton.cdiv(runs * width, _CHANNELS)
    stretch = triton.cdiv(triton.cdiv(tokens, max(1, _PROGRAMS // blocks)), _TOKENS) * _TOKENS
    parts = torch.empty(triton.cdiv(tokens, stretch), runs, width, dtype=torch.float32, device=x.device)
    _reduce[(blocks, parts.shape[0])](
        x,
        x if counted is None else counted.contiguous().view(torch.uint8),
        parts,
        tokens,
        stretch,
        x.stride(0),
        x.stride(1),
        width,
        runs * width,
        STATISTIC=statistic,
        MASKED=counted is not None,
        TOKENS=_TOKENS,
        CHANNELS=_CHANNELS,
    )
    return parts.amax(0) if statistic == "max-abs" else parts.sum(0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reduce(  # type: ignore[no-untyped-def]
    x,
    counted,
    parts,
    num_tokens,
    stretch,
    token_stride,
    run_stride,
    width,
    num_channels,
    STATISTIC: tl.constexpr,
    MASKED: tl.constexpr,
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
        if MASKED:
            counts = counts & (tl.load(counted + tokens, mask=counts, other=0) != 0)
        rows = tokens.to(tl.int64)[:, None] * token_stride
        value = tl.load(columns[None, :] + rows, mask=counts[:, None] & there[None, :], other=0.0).to(tl.float32)
        if STATISTIC == "rms":
            total += value * value
        elif STATISTIC == "max-abs":
            total = tl.maximum(total, tl.where(value == value, tl.abs(value), float("inf")))
        else:
            total += tl.abs(value)
    reduced = tl.max(total, axis=0) if STATISTIC == "max-abs" else tl.sum(total, axis=0)
    tl.store(parts + tl.program_id(1) * num_channels + channels, reduced, mask=there)
