"""Pictures of an observation: overview, heat maps, RoPE. Needs matplotlib (the `plots` extra); without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from megatron_longact.analysis.activations.measurement import by_layer
from megatron_longact.analysis.observe.observation import Observation
from megatron_longact.analysis.observe.outliers import OUTLIER, over_median, percent
from megatron_longact.config import LongActConfig, Tap
from megatron_longact.reporting.figures import DPI, FAINT_INK, INK, WIDTH_IN, saliency_figure
from megatron_longact.selection import select_masks

COLOURS = {"q": "#0072b2", "k": "#d55e00", "k-rope": "#cc79a7"}
MARKERS = {"q": "o", "k": "s", "k-rope": "^"}
TAP_NAMES: dict[Tap, str] = {"projection": "projection", "norm": "after qk-norm"}
MOST_LAYERS = 8
"""Of a heat map, and of a legend."""


def write(observation: Observation, folder: Path) -> None:
    """overview.png, heatmap-*.png for each tap, and rope.png for a model with RoPE."""
    overview_figure(observation).savefig(folder / "overview.png", dpi=DPI)
    for tap in observation.longest.taps:
        heatmap_figure(observation, tap).savefig(folder / f"heatmap-{tap}.png", dpi=DPI)
    if observation.rope is not None:
        rope_figure(observation).savefig(folder / "rope.png", dpi=DPI)


def style(axes: Axes, title: str) -> None:
    """Title, ticks and spines as everywhere in the project's pictures."""
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left", color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def overview_figure(observation: Observation) -> Figure:
    """Sorted channels of Q and of K by layer; outlier ratio by layer before and after qk-norm, and by length."""
    figure = Figure(figsize=(WIDTH_IN, 6.6), layout="constrained", facecolor="white")
    (q, k), (layers, lengths) = figure.subplots(2, 2)
    for axes, part in ((q, "q"), (k, "k")):
        _draw_sorted(axes, observation, part)
    _share_limits([q, k])
    _layer_legend(q, k, list(observation.longest.layer_numbers))
    _draw_by_layer(layers, observation)
    _draw_by_length(lengths, observation)
    _share_limits([layers, lengths])
    length = list(observation.by_length)[-1]
    at = f" at {length} tokens" if length else ""
    title = f"{observation.name}: {observation.statistic} of Q and K channels{at}"
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def _draw_sorted(axes: Axes, observation: Observation, part: str) -> None:
    values = observation.longest.channel_values("projection", observation.statistic, observation.layout)
    for colour, layer in zip(_layer_colours(len(values)), values, strict=True):
        sorted_ = over_median(values[layer][part]).sort(descending=True).values.numpy()
        share = (np.arange(len(sorted_)) + 0.5) / len(sorted_)
        axes.plot(
            share, sorted_, color=colour, linewidth=1.6 if len(values) <= MOST_LAYERS else 0.8, label=f"layer {layer}"
        )
    axes.axvspan(0, observation.ratio, color="#000000", alpha=0.06, linewidth=0)
    top = f"top {percent(observation.ratio)}"
    axes.text(observation.ratio / 2, 0.02, top, fontsize=9, color=FAINT_INK, ha="center",
              transform=axes.get_xaxis_transform())  # fmt: skip
    _times_median(axes)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("channels, largest first", fontsize=10)
    style(axes, f"{part.upper()} projection: every channel, sorted")


def _times_median(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(OUTLIER, color=FAINT_INK, linewidth=1, linestyle="--")
    axes.text(0.99, OUTLIER * 1.03, f"outliers: {OUTLIER:g} × the median", ha="right", va="bottom", fontsize=9,
              color=FAINT_INK, transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylabel("times the median channel", fontsize=10)


def _share_limits(panels: list[Axes]) -> None:
    low = min(axes.get_ylim()[0] for axes in panels)
    high = max(max(axes.get_ylim()[1] for axes in panels), OUTLIER * 1.4)
    for axes in panels:
        axes.set_ylim(low, high)


def _layer_colours(count: int) -> list[tuple[float, ...]]:
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0.85, 0, count))]


def _layer_legend(first: Axes, last: Axes, layers: list[int]) -> None:
    """Names, or for a deep model a colour bar."""
    if len(layers) <= MOST_LAYERS:
        first.legend(fontsize=9, frameon=False)
        return
    figure = last.get_figure()
    assert figure is not None
    colours = matplotlib.colors.ListedColormap(_layer_colours(256))
    bar = figure.colorbar(ScalarMappable(Normalize(layers[0], layers[-1]), colours), ax=last)
    bar.set_label("layer, from 0", fontsize=10)
    bar.ax.tick_params(labelsize=9, colors=INK)


def _draw_by_layer(axes: Axes, observation: Observation) -> None:
    for tap in observation.longest.taps:
        rows = observation.spreads(observation.longest, tap)
        for part in (section.name for section in observation.layout.sections):
            line = sorted((row.layer, row.outlier_ratio) for row in rows if row.part == part)
            _draw_line(axes, line, part, tap)
    axes.set_xticks(_ticks(list(observation.longest.layer_numbers)))
    axes.set_xlabel("layer, from 0", fontsize=10)
    _times_median(axes)
    style(axes, "largest channel by layer")
    axes.legend(fontsize=9, frameon=False)


def _draw_line(axes: Axes, line: Sequence[tuple[float, float]], part: str, tap: Tap) -> None:
    before = tap == "projection"
    axes.plot(
        [x for x, _ in line],
        [y for _, y in line],
        color=COLOURS[part],
        marker=MARKERS[part] if len(line) <= 2 * MOST_LAYERS else "",
        markersize=5,
        linewidth=1.6,
        linestyle="-" if before else ":",
        markerfacecolor=COLOURS[part] if before else "white",
        label=f"{part.upper()}, {TAP_NAMES[tap]}",
    )


def _ticks(layers: list[int]) -> list[int]:
    step = max(1, -(-len(layers) // 9))
    return layers[::step]


def _draw_by_length(axes: Axes, observation: Observation) -> None:
    places = list(range(len(observation.by_length)))
    for tap in observation.longest.taps:
        for part in (section.name for section in observation.layout.sections):
            largest = [
                max(row.outlier_ratio for row in observation.spreads(each, tap) if row.part == part)
                for each in observation.by_length.values()
            ]
            _draw_line(axes, list(zip(places, largest, strict=True)), part, tap)
    axes.set_xticks(places, [str(length or "any") for length in observation.by_length])
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_xlabel("context length, tokens", fontsize=10)
    _times_median(axes)
    style(axes, "largest channel of all layers by length")


def heatmap_figure(observation: Observation, tap: Tap) -> Figure:
    """Head × channel, Q and K of each layer, the top share orange; of a deep model the layers that stand out."""
    scores = observation.longest.scores[tap, observation.statistic]
    config = LongActConfig(ratio=observation.ratio, statistic=observation.statistic, tap=tap)
    masks = select_masks(scores, layout=observation.layout, config=config)
    ranked = [row.layer for row in observation.spreads(observation.longest, tap)]
    shown = sorted(list(dict.fromkeys(ranked))[:MOST_LAYERS])
    values, chosen = (
        {layer: of[layer] for layer in shown}
        for of in (by_layer(each, observation.longest.layer_numbers, observation.layout) for each in (scores, masks))
    )
    figure = saliency_figure(
        values,
        chosen,
        heads={section.name: section.heads for section in observation.layout.sections},
        statistic=f"{observation.statistic}, {TAP_NAMES[tap]}",
    )
    for axes, label in zip(figure.axes[-2:], (f"top {percent(observation.ratio)}", "the others"), strict=True):
        axes.texts[0].set_text(label)  # not a run's mask, which is what the figure is made for
    return figure


def rope_figure(observation: Observation) -> Figure:
    """Layer × RoPE wavelength: the largest channel of all heads over the layer's median; a row of panels a tap."""
    assert observation.rope is not None
    wavelengths = observation.rope.wavelengths
    layers, taps = observation.longest.layer_numbers, observation.longest.taps
    height = 1.1 + len(taps) * (1.0 + min(0.28 * max(len(layers), 3), 4.0))
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained", facecolor="white")
    panels = figure.subplots(len(taps), 2, squeeze=False)
    profiles = {tap: observation.rope_profiles(tap) for tap in taps}
    largest = max(float(v.max()) for of in profiles.values() for parts in of.values() for v in parts.values())
    norm = Normalize(0, max(largest, OUTLIER))
    for row, tap in enumerate(taps):
        for axes, part in zip(panels[row], profiles[tap][layers[0]], strict=True):
            cells = np.stack([profiles[tap][layer][part].numpy() for layer in layers])
            axes.imshow(cells, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
            style(axes, f"{part.upper()}, {TAP_NAMES[tap]}")
            axes.grid(visible=False)
            axes.set_yticks([layers.index(layer) for layer in _ticks(list(layers))], _ticks(list(layers)))
            places = np.unique(np.linspace(0, len(wavelengths) - 1, 6).round().astype(int))
            axes.set_xticks(places, [_short(wavelengths[place]) for place in places])
            axes.set_xlabel("RoPE wavelength, tokens", fontsize=10)
            axes.set_ylabel("layer, from 0", fontsize=10)
    bar = figure.colorbar(ScalarMappable(norm, "Blues"), ax=panels, aspect=30)
    bar.set_label("largest channel, times the layer's median", fontsize=10)
    bar.ax.tick_params(labelsize=9, colors=INK)
    return figure


def _short(tokens: float) -> str:
    """A number of tokens in four signs or less."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= factor:
            return f"{tokens / factor:.2g}{unit}" if tokens < 100 * factor else f"{tokens / factor:.0f}{unit}"
    return f"{tokens:.0f}"
