"""Replace the activations of chosen Q and K channels, and see what the model loses.

What is replaced is the output of `linear_qkv`, or of what makes Q and K in its place, before q/k-layernorm and RoPE: by
the channel's mean over prompts that were measured before, by zero, or by noise with the channel's own mean and standard
deviation. Forward hooks do it, so weights stay what they are, and `Disturbance` takes them off again whatever happens.

Shape letters: sq sequence, b batch, t = sq * b tokens, L layers of the whole model, L_r of this rank, n rows of a
layer on this rank, r those of one projection, m chosen ones of them, M chosen channels of the whole layer, nq/nk Q/K
channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import LongActConfig, Scope, Statistic, Targets
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.reduction import STATISTICS
from megatron_longact.selection import QK, random_saliency, select_masks

Channels = Literal["high", "low", "random"]
Replacement = Literal["mean", "zero", "noise"]

_TOKENS_AT_ONCE = 4096
"""Tokens whose fp64 copies are in memory at once."""

_SUM_OF_POWER = {1: 2, 2: 1}
"""Where `RowMeasurement` adds up |x| and x²."""


@dataclass(frozen=True)
class RowStatistics:
    """What was measured: mean and standard deviation of each local row, and the saliency of the whole model.

    mean, std: fp32 [L_r, n]; saliency: fp32 Q [L, nq], K [L, nk], the same on every rank; tokens: how many were seen.
    """

    mean: Tensor
    std: Tensor
    saliency: QK
    tokens: int


class RowMeasurement:
    """Sums x, x², |x| and the maximum of |x| of what each row puts out, in fp64, while it is entered."""

    def __init__(self, model: QKVModel) -> None:
        _check_whole_sequences(model)
        self._model = model
        self._sums = torch.zeros(4, len(model.layers), model.sharded.num_rows, dtype=torch.float64, device=model.device)
        self._tokens = torch.zeros(len(model.layers), dtype=torch.float64, device=model.device)
        self._handles: list[Any] = []

    def __enter__(self) -> RowMeasurement:
        for index, layer in enumerate(self._model.layers):
            for number, name in enumerate(layer.names):
                hook = self._hook(index, self._model.sharded.columns[name], counts=number == 0)
                self._handles.append(getattr(layer.attention, name).register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._handles)

    def _hook(self, index: int, columns: slice, *, counts: bool) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = _activations(output).detach().flatten(0, 1)  # [sq, b, r] -> [t, r]
            sums = self._sums[:, index, columns]
            for part in x.split(_TOKENS_AT_ONCE):
                wide = part.double()
                sums[0] += wide.sum(0)
                sums[1] += wide.square().sum(0)
                sums[2] += wide.abs().sum(0)
                sums[3] = torch.maximum(sums[3], wide.abs().amax(0))
            self._tokens[index] += x.shape[0] * counts

        return add

    def result(self, *, statistic: Statistic) -> RowStatistics:
        """What all data-parallel replicas saw together; collective.

        Raises `ValueError` if a layer saw no token, or NaN or Inf.
        """
        sums, tokens = self._sums.clone(), self._tokens.clone()
        for summed in (sums[:3], tokens):
            dist.all_reduce(summed, group=self._model.groups.dp_cp)
        dist.all_reduce(sums[3], dist.ReduceOp.MAX, group=self._model.groups.dp_cp)
        if not bool((tokens > 0).all()):
            raise ValueError("a layer's Q and K saw no token of the prompts: their forward hooks do not run here")
        mean, square, _ = sums[:3] / tokens[:, None]
        wanted = STATISTICS[statistic]
        scores = wanted.finish(sums[3 if wanted.maximum else _SUM_OF_POWER[wanted.power]], tokens[:, None])
        saliency = self._model.global_saliency(LongActConfig()).from_rows(scores.float())
        if not all(bool(torch.isfinite(part).all()) for part in saliency):
            raise ValueError("activations of Q or K hold NaN or Inf on these prompts; nothing can be chosen from them")
        std = (square - mean.square()).clamp(min=0).sqrt()
        seen = int(tokens.max()) if len(tokens) else 0
        return RowStatistics(mean.float(), std.float(), QK(*(part.cpu() for part in saliency)), seen)


class Disturbance:
    """While it is entered, the chosen channels of every layer put out something else; no other row changes.

    channels: bool, Q [L, nq] and K [L, nk] of the whole model, alike on all ranks. positions: how many positions
    noise must cover. Noise is a function of (seed, layer, channel, position) alone: it depends neither on the parallel
    layout nor on the batch, and a token has the same with and without a KV cache.
    """

    def __init__(
        self,
        model: QKVModel,
        channels: QK,
        *,
        replacement: Replacement,
        statistics: RowStatistics,
        seed: int = 0,
        positions: int = 0,
    ) -> None:
        _check_whole_sequences(model)
        self._model, self._replacement, self._statistics = model, replacement, statistics
        self._seed, self._num_positions = seed, positions
        self._chosen = torch.cat([channels.q, channels.k], dim=1).cpu()  # [L, nq + nk]
        self._channels = model.sharded.channels(model.groups.tp.rank())
        self._handles: list[Any] = []
        self._position_ids: Tensor | None = None

    def __enter__(self) -> Disturbance:
        try:
            for chunk in self._model.chunks if self._replacement == "noise" else ():
                self._handles.append(chunk.register_forward_pre_hook(self._positions(chunk), with_kwargs=True))
            for index, layer in enumerate(self._model.layers):
                for name, columns in self._model.sharded.columns.items():
                    hook = self._hook(index, layer.layer_number, columns)
                    if hook is not None:
                        self._handles.append(getattr(layer.attention, name).register_forward_hook(hook))
        except BaseException:
            _remove(self._handles)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._handles)
        self._position_ids = None

    def local_rows(self, layer_number: int) -> Tensor:
        """Which of this rank's n rows of a layer are replaced: int64 [m], ascending."""
        chosen = self._chosen[self._model.layer_numbers.index(layer_number)]
        of_rows = torch.cat([chosen, torch.zeros(1, dtype=torch.bool)])  # the last one is that of no channel
        return of_rows[self._channels].nonzero().flatten()

    def _hook(self, index: int, layer_number: int, columns: slice) -> Any:
        places = self.local_rows(layer_number)
        places = places[(places >= columns.start) & (places < columns.stop)]
        if not places.numel():
            return None
        on_device, rows = (each.to(self._model.device) for each in (places, places - columns.start))
        mean, std = self._statistics.mean[index, on_device], self._statistics.std[index, on_device]
        noise = self._noise(layer_number, self._channels[places]) if self._replacement == "noise" else None

        def replace(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = _activations(output)
            values = torch.zeros_like(mean) if self._replacement == "zero" else mean
            if noise is not None:
                assert self._position_ids is not None
                values = mean + std * noise[self._position_ids].transpose(0, 1)  # [b, sq, m] -> [sq, b, m]
            changed = x.clone()
            changed[..., rows] = values.to(x.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return replace

    def _noise(self, layer_number: int, channels: Tensor) -> Tensor:
        """Standard normal numbers of some of the chosen channels: fp32 [positions, m]."""
        chosen = self._chosen[self._model.layer_numbers.index(layer_number)]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + layer_number)
        table = torch.randn(self._num_positions, int(chosen.sum()), generator=generator)  # [positions, M]
        rows = torch.cat([projection.channels for projection in self._model.layout.projections])  # of the whole layer
        chosen_rows = torch.cat([chosen, torch.zeros(1, dtype=torch.bool)])[rows]
        numbers = torch.empty_like(chosen, dtype=torch.int64)
        numbers[rows[chosen_rows]] = torch.arange(table.shape[1])
        return table[:, numbers[channels]].to(self._model.device)

    def _positions(self, chunk: nn.Module) -> Any:
        signature = inspect.signature(chunk.forward)

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._position_ids = signature.bind_partial(*args, **kwargs).arguments["position_ids"]

        return remember


def choose_channels(
    channels: Channels,
    saliency: QK,
    *,
    layout: AttentionLayout,
    ratio: float,
    scope: Scope = "layer",
    targets: Targets = "qk",
    seed: int = 0,
) -> QK:
    """The highest, the lowest or random channels, as many each: bool Q [L, nq], K [L, nk].

    Chosen as `LongAct` chooses them. A projection that is not a target has none. Random ones may be among the
    highest; at a ratio of 0.3 three of ten are.
    """
    scores = saliency if channels != "random" else random_saliency(len(saliency.q), layout, seed=seed, refresh=0)
    config = LongActConfig(ratio=ratio, scope=scope, select=channels)
    return only_targets(select_masks(scores, layout=layout, config=config), targets)


def as_many(channels: Channels, masks: QK, saliency: QK, *, layout: AttentionLayout, seed: int = 0) -> QK:
    """`masks` themselves for "high", else the lowest or random channels, as many in each layer as the masks have."""
    if channels == "high":
        return masks
    scores = saliency if channels == "low" else random_saliency(len(saliency.q), layout, seed=seed, refresh=0)
    picked = []
    for score, mask in zip(scores, masks, strict=True):
        place = score.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the lowest
        picked.append(place < mask.sum(-1, keepdim=True))
    return QK(*picked)


def only_targets(masks: QK, targets: Targets) -> QK:
    """The masks with no channel in a projection that is not a target."""
    return QK(*(m if part in targets else torch.zeros_like(m) for part, m in zip("qk", masks, strict=True)))


def check_masks(masks: QK, *, source: str, targets: Targets) -> QK:
    """The masks of the targets; `ValueError` if they hold every channel or none, which says nothing."""
    for part, mask in zip("qk", masks, strict=True):
        share = float(mask.float().mean())
        if part in targets and share in (0.0, 1.0):
            other = "--targets k" if part == "q" else "--targets q"
            which = "every" if share else "no"
            raise ValueError(f"{source} marks {which} {part.upper()} channel; leave that projection out with {other}")
    return only_targets(masks, targets)


def shared(a: QK, b: QK) -> float:
    """Share of the channels of `a` that are in `b` too."""
    both = sum(int((x & y).sum()) for x, y in zip(a, b, strict=True))
    return both / max(sum(int(x.sum()) for x in a), 1)


def _check_whole_sequences(model: QKVModel) -> None:
    if model.sharded.partial:
        raise ValueError("with --multi-latent-attention this does not work with --sequence-parallel; leave it out")


def _activations(output: Any) -> Tensor:
    x: Tensor = output[0] if isinstance(output, tuple) else output
    return x


def _remove(handles: list[Any]) -> None:
    removed: Iterable[Any] = list(handles)
    handles.clear()
    for handle in removed:
        handle.remove()
