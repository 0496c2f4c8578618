"""Saliency: forward hooks that reduce Q and K activations over tokens into fp32 accumulators.

Shape letters: sq sequence on this rank, b micro-batch, t = sq * b tokens, L layers of this rank, n accumulated
channels of this rank.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_longact.config import LongActConfig
from megatron_longact.qkv_layers import QKVLayer, QKVModel
from megatron_longact.reduction import STATISTICS, Accumulator, Block, qk_blocks
from megatron_longact.refusals import check_layers_are_eager
from megatron_longact.tokens import TokenRules, counted_tokens, not_padding, zigzag

_FEW = 0.5


def few_named(named: float, real: float) -> str:
    """What is said when few of the tokens that are no padding were named; "" if enough, or none, were."""
    if not 0 < named < _FEW * real:
        return ""
    return (
        f"LongAct.set_tokens named {named:,.0f} of {real:,.0f} tokens that are no padding ({named / real:.0%}): that "
        "is probably a loss mask, which leaves the prompts out, and with them the long context; name all tokens that "
        "attention reads, prompt and response"
    )


@dataclass
class _Forward:
    """One forward of a model chunk that is being read."""

    named: Tensor | None
    """What `set_tokens` said: weights [b, s]."""
    rules: TokenRules
    """Those that are still to be applied to it."""
    arguments: dict[str, Any]
    """Of the model's forward, by name."""
    shape: tuple[int, ...] | None = None
    """[sq, b] of the activations; None until the first layer."""
    weights: Tensor | None = None
    """How often each token counts: [t]; None: all once."""
    reads: Counter[int] = field(default_factory=Counter)
    """How often a hook read each layer, by its place on this rank."""


class _Tap(NamedTuple):
    """An output that is read in every layer."""

    name: str
    """Of its module in Megatron's attention."""
    columns: slice
    """Where its channels stand among the accumulated ones."""
    blocks: list[Block]
    """Those of its channels that are Q or K."""
    parts: int = 1
    """Each tensor-parallel rank runs it over one of so many parts of the sequence."""


class SaliencyCapture:
    """Reads the Q and K channels of every layer in forwards that count; never changes an output.

    Whether a forward counts is decided when its model chunk is entered: rollouts and log-prob forwards do not, and
    activation recomputation, which runs outside, does not count again. A chunk that is left without each of its
    layers read is an error, whatever hid them.
    """

    def __init__(
        self,
        model: QKVModel,
        config: LongActConfig,
        *,
        counts: Callable[[], bool],
        clock: AbstractContextManager[Any],
        warn: Callable[[str], None],
    ) -> None:
        """Put the hooks on; `counts`: whether the forward that begins now is to be read; `clock` times our own work."""
        self.training_forwards = 0
        self._device = model.device
        self._counts, self._clock, self._warn = counts, clock, warn
        self._rules = TokenRules(config.min_context, config.skip_first_tokens)
        self._reads_activations = config.reads_activations
        self._sharded, self._tp_rank, self._cp = model.sharded, model.groups.tp.rank(), model.groups.cp
        self._taps = self._norm_taps() if config.tap == "norm" else self._projection_taps()
        self._named: Tensor | None = None
        self._rules_applied = False
        self._names_tokens = False
        self._forward: _Forward | None = None
        self.accumulator = Accumulator(
            len(model.layers),
            max(tap.columns.stop for tap in self._taps),
            statistic=STATISTICS[config.statistic],
            device=model.device,
        )
        self.named_of_real = torch.zeros(2, device=model.device)
        """fp32: tokens of this pass that `set_tokens` named, and those that are no padding."""
        self._hooks = ExitStack()
        self._hooks_of_layer: Counter[int] = Counter()
        try:
            self._hook_all(model)
        except BaseException:
            self.remove()
            raise

    def set_tokens(self, weights: Tensor, *, rules_applied: bool = False) -> None:
        """Name the tokens of the next micro-batch that count: weights [b, s], the whole sequences."""
        if weights.dim() != 2:
            raise ValueError(
                f"token_mask has shape {tuple(weights.shape)}; it must be [b, s], True where a token counts"
            )
        weights = weights.to(self._device, non_blocking=True)
        if weights.dtype != torch.bool:
            weights = torch.where(weights >= 0, weights.float(), torch.nan)  # a refresh with NaN is rejected
        self._named, self._rules_applied, self._names_tokens = weights, rules_applied, True

    def reset(self) -> None:
        """Begin a new pass."""
        self.accumulator.reset()
        self.named_of_real.zero_()
        self.training_forwards = 0

    def remove(self) -> None:
        """Take every hook off."""
        self._hooks.close()

    def _hook_all(self, model: QKVModel) -> None:
        first = 0
        for chunk, layers in zip(model.chunks, model.layers_of_chunks, strict=True):
            if self._reads_activations:
                for index, layer in enumerate(layers, first):
                    self._tap_layer(index, layer)
            self._watch(chunk, layers, slice(first, first + len(layers)))
            first += len(layers)

    def _watch(self, model: nn.Module, layers: Sequence[QKVLayer], places: slice) -> None:
        signature = inspect.signature(model.forward)
        eager = [module for module in model.modules() if isinstance(module, TransformerLayer)]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named, self._named, self._forward = self._named, None, None
            if torch.is_grad_enabled():
                self.training_forwards += 1
                if self._reads_activations:
                    check_layers_are_eager(eager)
            if self._reads_activations and self._counts():
                with self._clock, torch.no_grad():
                    self._forward = self._begin(named, signature.bind_partial(*args, **kwargs).arguments)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            forward, self._forward = self._forward, None
            if forward is not None and output is None:
                self.reset()  # an exception is on its way: this pass will not go on
            elif forward is not None:
                with self._clock, torch.no_grad():
                    self._end(forward, layers, places)

        self._put(model.register_forward_pre_hook(enter, with_kwargs=True))
        self._put(model.register_forward_hook(leave, always_call=True))

    def _put(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _begin(self, named: Tensor | None, arguments: dict[str, Any]) -> _Forward:
        if named is None and self._names_tokens:
            raise ValueError(
                "LongAct.set_tokens was called for earlier micro-batches but not for this one; call it for each"
            )
        if named is None and arguments.get("packed_seq_params") is None and arguments.get("padding_mask") is None:
            self._warn(
                "LongAct counts all tokens, padding included: the model was given neither packed_seq_params nor "
                "padding_mask; call LongAct.set_tokens(token_mask) before each forward to name those that count"
            )
        if named is not None and self._rules_applied:
            return _Forward(named, TokenRules(), arguments)  # not told who was named before the rules
        if named is not None:
            self.named_of_real += self._named_of_real(named, arguments)
        return _Forward(named, self._rules, arguments)

    def _named_of_real(self, named: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Tokens that were named, and those of the same that are no padding, as far as the model's arguments tell."""
        packed, padding, ids = (arguments.get(name) for name in ("packed_seq_params", "padding_mask", "input_ids"))
        bounds = packed.cu_seqlens_q if packed is not None and packed.qkv_format == "thd" else None
        if bounds is None:
            named = zigzag(named, cp_rank=self._cp.rank(), cp_size=self._cp.size())
        count = (named > 0).sum()
        real = not_padding(ids) if ids is not None and ids.shape == named.shape else None
        if bounds is not None:  # the padding behind the last sequence may be one of its own
            total = bounds[-1].to(count)
            real = total if real is None else torch.minimum(total, real)
        elif padding is not None:
            real = (~padding.bool()).sum()
        return torch.stack([count, count if real is None else real.to(count)]).float()

    def _end(self, forward: _Forward, layers: Sequence[QKVLayer], places: slice) -> None:
        hooked = self._hooks_of_layer
        unread = [layer.layer_number for i, layer in enumerate(layers, places.start) if forward.reads[i] < hooked[i]]
        if unread:
            raise RuntimeError(
                f"LongAct could not read Q and K of layers {unread} (Megatron's numbers, from 1): their forward hooks "
                "did not run. Something keeps them from running: a CUDA graph, torch.compile, or a linear_qkv that "
                "was replaced after LongAct.attach; switch it off, or attach after it"
            )
        if forward.shape is not None:
            sq, b = forward.shape
            self.accumulator.count(places, sq * b if forward.weights is None else forward.weights.sum())

    def _projection_taps(self) -> list[_Tap]:
        """Channel j of a projection's output comes from local row j, whatever the layout."""
        sharded, taps = self._sharded, []
        for projection in sharded.layout.projections:
            blocks = qk_blocks(sharded.qk_ranges(projection, self._tp_rank))
            parts = sharded.tp_size if projection.name in sharded.whole and sharded.sequence_parallel else 1
            taps.append(_Tap(projection.name, sharded.columns[projection.name], blocks, parts))
        return taps

    def _norm_taps(self) -> list[_Tap]:
        layout, taps, start = self._sharded.layout, [], 0
        channels = layout.norm_channels(self._tp_rank, self._sharded.tp_size)
        for name, (section,), of in zip(layout.norms, (layout.q_sections, layout.k_sections), channels, strict=True):
            block = Block(0, len(of) // section.width, section.width, section.width)
            taps.append(_Tap(name, slice(start, start + len(of)), [block]))
            start += len(of)
        return taps

    def _tap_layer(self, index: int, layer: QKVLayer) -> None:
        for tap in self._taps:
            module = getattr(layer.attention, tap.name, None)
            if not isinstance(module, nn.Module):
                raise ValueError(f"--longact-tap norm: layer {layer.layer_number} has no {tap.name}; use projection")
            self._put(module.register_forward_hook(self._hook(index, tap)))
            self._hooks_of_layer[index] += 1

    def _hook(self, index: int, tap: _Tap) -> Callable[..., None]:
        """Read an output [sq, b, channels], [sq, b, heads, hn], or, of packed sequences, [t, channels]."""
        sums = self.accumulator.sums[index, tap.columns]
        sums_of_blocks = [(block, block.of(sums)) for block in tap.blocks]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._forward is not None:
                with self._clock, torch.no_grad():
                    x = output[0] if isinstance(output, tuple) else output
                    x = x[:, None] if x.dim() == 2 else x
                    weights = self._weights_of(self._forward, x, tap.parts)
                    self._forward.reads[index] += 1
                    channels = x.flatten(2).flatten(0, 1)  # [t, channels]
                    for block, into in sums_of_blocks:
                        self.accumulator.add(into, block.of(channels), weights)

        return hook

    def _weights_of(self, forward: _Forward, x: Tensor, parts: int) -> Tensor | None:
        """How often each token of an output counts; parts: of so many equal parts of the sequence it has one."""
        self._fit_tokens(forward, (x.shape[0] * parts, x.shape[1]))
        if forward.weights is None or parts == 1:
            return forward.weights
        return forward.weights.chunk(parts)[self._tp_rank]

    def _fit_tokens(self, forward: _Forward, shape: tuple[int, int]) -> None:
        """Work out which tokens count, once the first layer has said how many there are; they must be as many."""
        if forward.shape == shape:
            return
        weights = counted_tokens(
            rules=forward.rules,
            named=forward.named,
            packed_seq_params=forward.arguments.get("packed_seq_params"),
            padding_mask=forward.arguments.get("padding_mask"),
            cp_rank=self._cp.rank(),
            cp_size=self._cp.size(),
            total=shape[0] * self._cp.size(),
        )
        if weights is not None and tuple(weights.shape) != shape:
            raise ValueError(
                f"the token mask covers {tuple(weights.shape)} tokens [sq, b], but attention saw {shape}; give "
                "LongAct.set_tokens the [b, s] mask of the very micro-batch that the model gets"
            )
        forward.shape, forward.weights = shape, None if weights is None else weights.reshape(-1)
