"""Saliency: forward hooks that reduce Q and K activations over tokens into fp32 accumulators.

Shape letters: sq sequence on this rank, b micro-batch, t = sq * b tokens, np/ng query heads/groups, hn
kv_channels, L layers of this rank, n accumulated channels of this rank.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_longact.config import LongActConfig, Statistic
from megatron_longact.qkv_layers import QKVLayer, QKVModel
from megatron_longact.refusals import check_layers_are_eager
from megatron_longact.tokens import TokenRules, counted_tokens

_CHUNKS = 8  # temporaries of a reduction hold at most this fraction of its input
_CACHED_BYTES = 2**24  # what a GPU writes and reads again stays in its L2 cache: 50 MB on an H100


def reduce_tokens(x: Tensor, counted: Tensor | None, *, statistic: Statistic) -> Tensor:
    """Sum over tokens of |x|, of x², or the maximum of |x|: x [t, ...] -> fp32 [...].

    counted: bool [t], the tokens that count; None: all. What the others hold, NaN included, does not
    matter; a NaN or Inf that counts stays one. Reads x once; temporaries hold an eighth of the tokens at most.
    The order of the sum differs between devices, and with it the last bits.
    """
    reduce = reduce_by_norm if x.is_cuda else reduce_by_chunks
    return reduce(x, counted, statistic=statistic)


def reduce_by_chunks(x: Tensor, counted: Tensor | None, *, statistic: Statistic) -> Tensor:
    """`reduce_tokens` through temporaries: on a CPU several times as fast as a norm, which is not vectorised there."""
    total = torch.zeros(x.shape[1:], dtype=torch.float32, device=x.device)
    rows = -(-x.shape[0] // _CHUNKS)
    for start in range(0, x.shape[0], rows):
        part = _sum_of(_counted(x, counted, slice(start, start + rows)), statistic)
        # amax and maximum both propagate NaN
        total = torch.maximum(total, part) if statistic == "max-abs" else total + part
    return total


def _sum_of(x: Tensor, statistic: Statistic) -> Tensor:
    if statistic == "max-abs":
        return x.abs().amax(0).float()
    return x.float().square().sum(0) if statistic == "rms" else x.abs().sum(0, dtype=torch.float32)


def reduce_by_norm(x: Tensor, counted: Tensor | None, *, statistic: Statistic) -> Tensor:
    """`reduce_tokens` in the one kernel of a norm, which on a GPU casts as it reads and needs no temporary.

    With `counted` it reads copies with zeros for what does not count, each small enough to stay in the cache.
    """
    order = {"mean-abs": 1.0, "rms": 2.0, "max-abs": float("inf")}[statistic]
    rows = x.shape[0]
    if counted is not None:
        rows = min(-(-rows // _CHUNKS), max(1, _CACHED_BYTES // (x[0].numel() * x.element_size())))
    norms = torch.stack(
        [
            torch.linalg.vector_norm(
                _counted(x, counted, slice(start, start + rows)), order, dim=0, dtype=torch.float32
            )
            for start in range(0, x.shape[0], rows)
        ]
    )
    if statistic == "max-abs":
        return norms.amax(0)
    return norms.square().sum(0) if statistic == "rms" else norms.sum(0)


def _counted(x: Tensor, counted: Tensor | None, tokens: slice) -> Tensor:
    """Some of the tokens: a view of x, or a copy with zeros for those that do not count."""
    part = x[tokens]
    return part if counted is None else torch.where(counted[tokens].view(-1, *(1,) * (x.dim() - 1)), part, 0)


class Accumulator:
    """fp32 sums of one pass for all layers of this rank: `sums` [L, n + 1], the last column counts tokens."""

    def __init__(self, num_layers: int, num_channels: int, *, statistic: Statistic, device: torch.device) -> None:
        self.statistic = statistic
        self.sums = torch.zeros(num_layers, num_channels + 1, dtype=torch.float32, device=device)

    def add(self, layer: int, start: int, x: Tensor, counted: Tensor | None) -> None:
        """Add activations x [sq, b, ...] of the channels that begin at `start`; counted: bool [sq, b]."""
        num_channels = x[0, 0].numel()
        self.add_to(self.sums[layer, start : start + num_channels].view(x.shape[2:]), x, counted)

    def add_to(self, into: Tensor, x: Tensor, counted: Tensor | None) -> None:
        """The same for a view of `sums` that is shaped as the channels of x."""
        x = x.detach().flatten(0, 1)  # [sq, b, ...] -> [t, ...]
        tokens = None if counted is None else counted.reshape(-1)
        value = reduce_tokens(x, tokens, statistic=self.statistic)
        if self.statistic == "max-abs":
            torch.maximum(into, value, out=into)
        else:
            into += value

    def count(self, layer: int, num_tokens: int, counted: Tensor | None) -> None:
        """Count the tokens of a forward once."""
        self.sums[layer, -1] += num_tokens if counted is None else counted.sum()

    def reset(self) -> None:
        """Begin a new pass."""
        self.sums.zero_()


class Block(NamedTuple):
    """Equal runs of channels at equal distances, such as Q and K of all groups, which one kernel can read."""

    start: int
    runs: int
    period: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The channels as a view: [..., n] -> [..., runs, width]."""
        length = (self.runs - 1) * self.period + self.width
        return x.narrow(-1, self.start, length).unfold(-1, self.width, self.period)


def qk_blocks(ranges: Sequence[tuple[int, int]]) -> list[Block]:
    """Put together the [start, end) ranges of one width if they lie at equal distances."""
    by_width: dict[int, list[int]] = {}
    for start, end in ranges:
        by_width.setdefault(end - start, []).append(start)
    blocks = []
    for width, starts in by_width.items():
        periods = {b - a for a, b in pairwise(starts)} or {width}
        if len(periods) == 1:
            blocks.append(Block(starts[0], len(starts), periods.pop(), width))
        else:
            blocks += [Block(start, 1, width, width) for start in starts]
    return blocks


class SaliencyCapture:
    """Reads the Q and K channels of every layer in training forwards; never changes an output.

    A forward counts if gradients were enabled when the model chunk was entered: rollouts and log-prob
    forwards do not count, and activation recomputation, which runs outside, does not count again.
    """

    def __init__(
        self,
        model: QKVModel,
        config: LongActConfig,
        *,
        clock: AbstractContextManager[Any],
        warn: Callable[[str], None],
    ) -> None:
        """Put the hooks on; `clock` times their own work."""
        self.enabled = False
        self.training_forwards = 0
        self._rules = TokenRules(config.min_context, config.skip_first_tokens)
        self._reads_activations = config.reads_activations
        self._tap, self._layout = config.tap, model.layout
        self._tp_size, self._cp = model.groups.tp.size(), model.groups.cp
        self._clock, self._warn = clock, warn
        self._blocks = qk_blocks(model.layout.local_qk_ranges(model.groups.tp.rank(), self._tp_size))
        self._named: Tensor | None = None
        self._names_tokens = False
        self._counting, self._packed = False, False
        self._counted: Tensor | None = None
        self.accumulator = Accumulator(
            len(model.layers), self._num_channels(), statistic=config.statistic, device=model.device
        )
        self._handles: list[Any] = []
        if self._reads_activations:
            for index, layer in enumerate(model.layers):
                self._tap_layer(index, layer)
        for chunk in model.chunks:
            self._watch(chunk)

    def set_tokens(self, token_mask: Tensor) -> None:
        """Name the tokens of the next micro-batch that count: bool [b, s], the whole sequences."""
        if token_mask.dim() != 2:
            raise ValueError(
                f"token_mask has shape {tuple(token_mask.shape)}; it must be [b, s], True where a token counts"
            )
        self._named, self._names_tokens = token_mask.bool(), True

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, model: nn.Module) -> None:
        signature = inspect.signature(model.forward)
        layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named, self._named = self._named, None
            if torch.is_grad_enabled():
                self.training_forwards += 1
                if self._reads_activations:
                    check_layers_are_eager(layers)
            self._counting = self.enabled and torch.is_grad_enabled()
            if self._counting:
                with self._clock, torch.no_grad():
                    arguments = signature.bind_partial(*args, **kwargs).arguments
                    self._counted = self._tokens(named, arguments)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._counting, self._counted = False, None

        self._handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(model.register_forward_hook(leave, always_call=True))

    def _tokens(self, named: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
        if named is None and self._names_tokens:
            raise ValueError(
                "LongAct.set_tokens was called for earlier micro-batches but not for this one; call it for each"
            )
        packed, padding = arguments.get("packed_seq_params"), arguments.get("padding_mask")
        self._packed = packed is not None
        if named is None and packed is None and padding is None:
            self._warn(
                "LongAct counts all tokens, padding included: the model was given neither packed_seq_params nor "
                "padding_mask; call LongAct.set_tokens(token_mask) before each forward to name those that count"
            )
        return counted_tokens(
            rules=self._rules,
            named=named,
            packed_seq_params=packed,
            padding_mask=padding,
            cp_rank=self._cp.rank(),
            cp_size=self._cp.size(),
        )

    def _num_channels(self) -> int:
        if self._tap == "projection":
            return self._layout.rows_per_partition(self._tp_size)
        return self._local_q_channels() + self._local_k_channels()

    def _local_q_channels(self) -> int:
        return self._layout.num_q_channels // self._tp_size

    def _local_k_channels(self) -> int:
        return max(self._layout.num_query_groups // self._tp_size, 1) * self._layout.kv_channels

    def _tap_layer(self, index: int, layer: QKVLayer) -> None:
        if self._tap == "projection":
            self._hook(layer.linear_qkv, index, self._add_projection)
            return
        split = self._local_q_channels()
        self._hook(layer.attention.q_layernorm, index, lambda i, x: self._add_heads(i, 0, x))
        self._hook(layer.attention.k_layernorm, index, lambda i, x: self._add_heads(i, split, x))

    def _hook(self, module: Any, index: int, add: Callable[[int, Tensor], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._counting:
                with self._clock, torch.no_grad():
                    add(index, output[0] if isinstance(output, tuple) else output)

        self._handles.append(module.register_forward_hook(hook))

    def _add_projection(self, index: int, x: Tensor) -> None:
        """Add x [sq, b, rows of this shard]: channel j comes from local row j, whatever the layout."""
        self._fit_tokens(x)
        for block in self._blocks:
            self.accumulator.add_to(block.of(self.accumulator.sums[index]), block.of(x), self._counted)
        self.accumulator.count(index, x.shape[0] * x.shape[1], self._counted)

    def _add_heads(self, index: int, start: int, x: Tensor) -> None:
        """Add x [sq, b, heads, hn]: Q (start 0) or K after its layernorm."""
        self._fit_tokens(x)
        self.accumulator.add(index, start, x, self._counted)
        if start == 0:
            self.accumulator.count(index, x.shape[0] * x.shape[1], self._counted)

    def _fit_tokens(self, x: Tensor) -> None:
        """Hold the token mask against what attention saw; padding behind the last packed sequence is not in it."""
        if self._counted is None or self._counted.shape == x.shape[:2]:
            return
        missing = x.shape[0] - self._counted.shape[0]
        if self._packed and missing > 0 and self._cp.size() == 1:
            self._counted = nn.functional.pad(self._counted, (0, 0, 0, missing))
            return
        raise ValueError(
            f"the token mask covers {tuple(self._counted.shape)} tokens [sq, b], but attention saw "
            f"{tuple(x.shape[:2])}; give LongAct.set_tokens the [b, s] mask of the very micro-batch "
            "that the model gets"
        )
