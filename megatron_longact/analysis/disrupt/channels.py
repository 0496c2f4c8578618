"""Replace the activations of chosen Q and K channels, and see what the model loses.

What is replaced is the output of `linear_qkv`, before q/k-layernorm and RoPE: by the channel's mean over prompts that
were measured before, by zero, or by noise with the channel's own mean and standard deviation. Forward hooks do it,
so weights stay what they are, and `Disturbance` takes them off again whatever happens.

Shape letters: sq sequence, b batch, t = sq * b tokens, L layers of the whole model, L_r of this rank, r rows of this
rank's shard of `linear_qkv`, m chosen rows of them, M chosen rows of the whole layer, nq/nk Q/K channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_longact.config import LongActConfig, Scope, Statistic, Targets
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.reduction import STATISTICS
from megatron_longact.selection import QK, GlobalSaliency, random_saliency, select_masks

Channels = Literal["high", "low", "random"]
Replacement = Literal["mean", "zero", "noise"]

_TOKENS_AT_ONCE = 4096
"""Tokens whose fp64 copies are in memory at once."""

_SUM_OF_POWER = {1: 2, 2: 1}
"""Where `RowMeasurement` adds up |x| and x²."""


@dataclass(frozen=True)
class RowStatistics:
    """What was measured: mean and standard deviation of each local row, and the saliency of the whole model.

    mean, std: fp32 [L_r, r]; saliency: fp32 Q [L, nq], K [L, nk], the same on every rank; tokens: how many were seen.
    """

    mean: Tensor
    std: Tensor
    saliency: QK
    tokens: int


class RowMeasurement:
    """Sums x, x², |x| and the maximum of |x| of each row of `linear_qkv`'s output, in fp64, while it is entered."""

    def __init__(self, model: QKVModel) -> None:
        rows = model.layout.rows_per_partition(model.groups.tp.size())
        self._model = model
        self._sums = torch.zeros(4, len(model.layers), rows, dtype=torch.float64, device=model.device)
        self._tokens = torch.zeros(len(model.layers), dtype=torch.float64, device=model.device)
        self._handles: list[Any] = []

    def __enter__(self) -> RowMeasurement:
        for index, layer in enumerate(self._model.layers):
            self._handles.append(layer.linear_qkv.register_forward_hook(self._hook(index)))
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._handles)

    def _hook(self, index: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = _activations(output).detach().flatten(0, 1)  # [sq, b, r] -> [t, r]
            sums = self._sums[:, index]
            for part in x.split(_TOKENS_AT_ONCE):
                wide = part.double()
                sums[0] += wide.sum(0)
                sums[1] += wide.square().sum(0)
                sums[2] += wide.abs().sum(0)
                sums[3] = torch.maximum(sums[3], wide.abs().amax(0))
            self._tokens[index] += x.shape[0]

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
            raise ValueError("a layer's linear_qkv saw no token of the prompts: its forward hooks do not run here")
        mean, square, _ = sums[:3] / tokens[:, None]
        wanted = STATISTICS[statistic]
        scores = wanted.finish(sums[3 if wanted.maximum else _SUM_OF_POWER[wanted.power]], tokens[:, None])
        saliency = _global_saliency(self._model).from_rows(scores.float())
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
        self._model, self._replacement, self._statistics = model, replacement, statistics
        self._seed, self._num_positions = seed, positions
        self._chosen = model.layout.fused(channels.q.cpu(), channels.k.cpu(), fill=False)  # [L, rows of the layer]
        self._handles: list[Any] = []
        self._position_ids: Tensor | None = None

    def __enter__(self) -> Disturbance:
        try:
            for chunk in self._model.chunks if self._replacement == "noise" else ():
                self._handles.append(chunk.register_forward_pre_hook(self._positions(chunk), with_kwargs=True))
            for index, layer in enumerate(self._model.layers):
                hook = self._hook(index, layer.layer_number)
                if hook is not None:
                    self._handles.append(layer.linear_qkv.register_forward_hook(hook))
        except BaseException:
            _remove(self._handles)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._handles)
        self._position_ids = None

    def local_rows(self, layer_number: int) -> Tensor:
        """Rows of this rank's shard that are replaced in a layer: int64 [m], ascending."""
        tp = self._model.groups.tp
        chosen = self._chosen[self._model.layer_numbers.index(layer_number)]
        return chosen[self._model.layout.partition(tp.rank(), tp.size())].nonzero().flatten()

    def _hook(self, index: int, layer_number: int) -> Any:
        rows = self.local_rows(layer_number).to(self._model.device)
        if not rows.numel():
            return None
        mean, std = self._statistics.mean[index, rows], self._statistics.std[index, rows]
        noise = self._noise(layer_number) if self._replacement == "noise" else None

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

    def _noise(self, layer_number: int) -> Tensor:
        """Standard normal numbers of this rank's chosen rows: fp32 [positions, m]."""
        tp = self._model.groups.tp
        partition = self._model.layout.partition(tp.rank(), tp.size())
        chosen = self._chosen[self._model.layer_numbers.index(layer_number)]
        before, own = int(chosen[: partition.start].sum()), int(chosen[partition].sum())
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + layer_number)
        table = torch.randn(self._num_positions, int(chosen.sum()), generator=generator)  # [positions, M]
        return table[:, before : before + own].to(self._model.device)

    def _positions(self, chunk: nn.Module) -> Any:
        signature = inspect.signature(chunk.forward)

        def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._position_ids = signature.bind_partial(*args, **kwargs).arguments["position_ids"]

        return remember


def choose_channels(
    channels: Channels,
    saliency: QK,
    *,
    layout: QKVLayout,
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


def as_many(channels: Channels, masks: QK, saliency: QK, *, layout: QKVLayout, seed: int = 0) -> QK:
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


def _global_saliency(model: QKVModel) -> GlobalSaliency:
    numbers: Sequence[int] = [layer.layer_number for layer in model.layers]
    return GlobalSaliency(
        model.groups, model.layout, LongActConfig(), layer_numbers=model.layer_numbers, local_layers=numbers
    )


def _activations(output: Any) -> Tensor:
    x: Tensor = output[0] if isinstance(output, tuple) else output
    return x


def _remove(handles: list[Any]) -> None:
    removed: Iterable[Any] = list(handles)
    handles.clear()
    for handle in removed:
        handle.remove()
