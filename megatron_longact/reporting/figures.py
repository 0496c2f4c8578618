"""Pictures of a run: the saliency of every Q and K channel with the chosen ones marked, and the training curve.

Needs matplotlib (the `plots` extra). Figures are made without pyplot: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

ChannelValues = Mapping[int, Mapping[str, Tensor]]
"""By global layer number, then "q" [np * hn] and "k" [ng * hn], head by head, or whatever sections a layer has."""

WIDTH_IN, DPI = 9.0, 200  # shown about 900 px wide, so 9 pt is 12 px there
INK, FAINT_INK = "#222222", "#555555"

# Saliency: light to dark, blue or orange: apart for every kind of colour vision, also where both are light.
FROZEN, CHOSEN = (
    ListedColormap(matplotlib.colormaps[name](np.linspace(start, 1, 256)), name=f"longact-{name.lower()}")
    for name, start in (("Blues", 0.1), ("Oranges", 0.3))
)

MOST_LAYERS = 8
"""Of a saliency figure that shows every head of every layer."""
MOST_INCHES = 11.0
"""For the panels of such a figure together."""

# Inches: around and between the panels of the saliency figure.
LEFT, RIGHT, COLUMN_GAP, ROW_GAP, TOP, BOTTOM = 0.55, 0.15, 0.65, 0.55, 1.25, 0.5


def plot_saliency(
    saliency: ChannelValues,
    masks: ChannelValues,
    *,
    heads: Mapping[str, int],
    path: Path,
    statistic: str = "mean |activation|",
) -> None:
    """Write the figure of `saliency_figure` as a PNG; layers, which `LongAct` counts from 1, are shown from 0."""
    saliency, masks = ({number - 1: of[number] for number in of} for of in (saliency, masks))
    saliency_figure(saliency, masks, heads=heads, statistic=statistic).savefig(path, dpi=DPI)


def saliency_figure(
    saliency: ChannelValues,
    masks: ChannelValues,
    *,
    heads: Mapping[str, int],
    statistic: str = "mean |activation|",
) -> Figure:
    """Heat maps head × channel, a row of two panels (Q, K) a layer, on one logarithmic scale.

    Channels that `masks` holds True are orange, the others blue. Layer numbers are those of Hugging Face's names, from
    0. Of a model with more than `MOST_LAYERS` the first, the middle and the last are drawn so, below all layers with
    their heads taken together. heads: the number of heads of "q" and of "k", or of other sections. Raises ValueError
    if nothing in `saliency` is finite and above 0.
    """
    layers, deep = sorted(saliency), len(saliency) > MOST_LAYERS
    shown = [layers[0], layers[len(layers) // 2], layers[-1]] if deep else layers
    norm = _scale([values for layer in saliency.values() for values in layer.values()])
    over = min(max(0.045 * len(layers), 1.2), 2.6) if deep else 0.0
    above = 2 * (over + ROW_GAP) if deep else 0.0
    panel = min(max(0.22 * max(heads.values()), 0.8), (5.0 if deep else MOST_INCHES) / len(shown) - ROW_GAP)
    figure = Figure(
        figsize=(WIDTH_IN, TOP + above + len(shown) * (panel + ROW_GAP) - ROW_GAP + BOTTOM), facecolor="white"
    )
    width = (WIDTH_IN - LEFT - RIGHT - COLUMN_GAP * (len(heads) - 1)) / len(heads)
    cells = {
        part: {n: [of[n][part].detach().cpu().reshape(count, -1) for of in (saliency, masks)] for n in layers}
        for part, count in heads.items()
    }
    lefts = [LEFT + column * (width + COLUMN_GAP) for column in range(len(heads))]
    if deep:
        for left, part in zip(lefts, heads, strict=True):
            places = [TOP + row * (over + ROW_GAP) for row in range(2)]
            panels = [_axes(figure, left=left, top=top, width=width, height=over) for top in places]
            _draw_layers(panels, cells[part], norm, part=part.upper())
    for row, number in enumerate(shown):
        for left, part in zip(lefts, heads, strict=True):
            top = TOP + above + row * (panel + ROW_GAP)
            axes = _axes(figure, left=left, top=top, width=width, height=panel)
            values, chosen = cells[part][number]
            _draw_panel(axes, values.float(), chosen.bool(), norm)
            axes.set_title(f"layer {number} · {part.upper()}", fontsize=10.5, fontweight="bold", loc="left")
            axes.set_title(f"{int(chosen.sum())} of {chosen.numel()} chosen", fontsize=9, loc="right", color=FAINT_INK)
            if number == shown[-1]:
                axes.set_xlabel("channel", fontsize=10)
    _add_scales(figure, norm, f"{statistic}, layers counted from 0")
    return figure


def _draw_layers(panels: Sequence[Axes], cells: Mapping[int, Sequence[Tensor]], norm: LogNorm, *, part: str) -> None:
    """All layers, two panels layer × channel: the largest of the heads, and the share of them that chose it."""
    layers = list(cells)
    values = torch.stack([values.float().amax(0) for values, _ in cells.values()])  # [layers, channels]
    share = torch.stack([chosen.float().mean(0) for _, chosen in cells.values()])
    shown: tuple[tuple[Axes, Tensor, Colormap, Normalize, str], ...] = (
        (panels[0], values, FROZEN, norm, "largest of the heads"),
        (panels[1], share, matplotlib.colormaps["Oranges"], Normalize(0, 1), "share of heads that chose it"),
    )
    for axes, drawn, colours, scale, title in shown:
        axes.imshow(drawn.numpy(), cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        axes.set_title(f"all layers · {part}", fontsize=10.5, fontweight="bold", loc="left")
        axes.set_title(title, fontsize=9, loc="right", color=FAINT_INK)
        places = range(0, len(layers), ceil(len(layers) / 8))
        axes.set_yticks(places, [str(layers[place]) for place in places])
        axes.set_xticks(range(0, drawn.shape[1], ceil(drawn.shape[1] / 8)))
        axes.tick_params(labelsize=9, length=2.5, colors=INK)
        axes.set_ylabel("layer", fontsize=10)


def _axes(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, counted from the top left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _scale(values: Sequence[Tensor]) -> LogNorm:
    """One scale for all panels: from the 1st percentile of what is above 0 to the largest value."""
    shown = torch.cat([value.detach().float().flatten().cpu() for value in values]) if values else torch.empty(0)
    shown = shown[shown.isfinite() & (shown > 0)]
    if not len(shown):
        raise ValueError("no saliency to draw: no activation was counted yet")
    top = shown.max().item()
    low = shown.sort().values[len(shown) // 100].item()
    return LogNorm(min(low, top / 2), top, clip=True)


def _draw_panel(axes: Axes, values: Tensor, chosen: Tensor, norm: LogNorm) -> None:
    """One panel; values and chosen: [heads, channels]."""
    num_heads, channels = values.shape
    for colours, hidden in ((FROZEN, chosen), (CHOSEN, ~chosen)):
        cells = np.ma.masked_array(values.numpy(), mask=hidden.numpy())
        axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", label=colours.name)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    points = axes.get_position().height * figure.get_figheight() * 72
    for edge in range(1, num_heads):
        axes.axhline(edge - 0.5, color="white", linewidth=min(1.2, points / num_heads / 8))
    axes.set_yticks(range(0, num_heads, ceil(num_heads / min(8, points / 12))))
    axes.set_xticks(range(0, channels, ceil(channels / 8)))
    axes.tick_params(labelsize=9, length=2.5, colors=INK)
    axes.set_ylabel("head", fontsize=10)


def _add_scales(figure: Figure, norm: LogNorm, statistic: str) -> None:
    """The two colour bars, one under the other, with one row of numbers for both."""
    low, high = float(norm.vmin or 1), float(norm.vmax or 1)
    figure.text(
        5.0 / WIDTH_IN,
        1 - 0.2 / figure.get_figheight(),
        f"{statistic} (log scale)",
        ha="center",
        fontsize=10,
        color=INK,
    )
    for line, (colours, label) in enumerate(((CHOSEN, "chosen, row is updated"), (FROZEN, "row is frozen"))):
        axes = _axes(figure, left=3.0, top=0.27 + 0.2 * line, width=4.0, height=0.16)
        bar = figure.colorbar(ScalarMappable(norm, colours), cax=axes, orientation="horizontal")
        bar.set_ticks([low * (high / low) ** (i / 4) for i in range(5)] if line else [])
        bar.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{float(f'{value:.2g}'):g}"))
        axes.tick_params(labelsize=9, length=2.5, colors=INK)
        axes.text(-0.02, 0.5, label, transform=axes.transAxes, ha="right", va="center", fontsize=10, color=INK)


def plot_reward(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], *, path: Path) -> None:
    """Write the figure of `reward_figure` as a PNG."""
    reward_figure(rows, evaluations).savefig(path, dpi=DPI)


def reward_figure(rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels over iterations: reward and accuracy of the rollouts; accuracy on the held-out tasks.

    rows: those of metrics.jsonl; evaluations: those of evaluations.jsonl.
    """
    figure = Figure(figsize=(WIDTH_IN, 3.2), layout="constrained", facecolor="white")
    rollouts, heldout = figure.subplots(1, 2)
    iterations = [row["iteration"] for row in rows]
    for name, label, colour, width in (
        ("reward_mean", "mean reward", "#0072b2", 4.0),  # where the two are alike the one is seen behind the other
        ("accuracy", "accuracy", "#d55e00", 1.5),
    ):
        shown = rollouts.plot(iterations, [row[name] for row in rows], color=colour, label=label, linewidth=width)
        shown[0].set_alpha(0.45 if width > 2 else 1)
    iterations = [row["iteration"] for row in evaluations]
    lengths = sorted({int(length) for row in evaluations for length in row["accuracy_by_length"]})
    curves = [  # with a gap where others were asked
        (f"{length} tokens", [row["accuracy_by_length"].get(str(length)) for row in evaluations]) for length in lengths
    ]
    colours = [*matplotlib.colormaps["viridis"](np.linspace(0.85, 0.15, len(lengths))), INK]
    for place, (label, values) in enumerate([*curves, ("all", [row["accuracy"] for row in evaluations])]):
        behind = len(curves) - place  # equal curves lie one around the other
        step = min(1.0, 5 / max(len(curves), 1)) * behind
        width, size = 1.8 + 1.3 * step, 5 + 2 * step
        look = {"markerfacecolor": "white", "markeredgewidth": 1.5} if behind else {}
        heldout.plot(
            iterations, values, color=colours[place], marker="o", markersize=size, linewidth=width, label=label, **look
        )
    heldout.set_ylim(-0.05, 1.05)
    heldout.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    heldout.yaxis.set_major_formatter(PercentFormatter(1))
    for axes, title in ((rollouts, "rollouts"), (heldout, "held-out accuracy by context length")):
        axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
        axes.set_xlabel("iteration", fontsize=10)
        axes.tick_params(labelsize=9, colors=INK)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=9, frameon=False)
    return figure
