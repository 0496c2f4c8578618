"""Pictures of scores by length. Needs matplotlib (the `plots` extra); made without pyplot, as `rl.plots`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_longact.reporting.figures import DPI, FAINT_INK, INK, WIDTH_IN
from megatron_longact.tasks.benchmark import Bars, Curves, counted_as

_CURVES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"))
"""Okabe and Ito's colours, and a marker each."""
_SHADES = ((INK,), ("#56b4e9", "#0072b2"), ("#e69f00", "#d55e00", "#8c3b00"))
"""Of bars: those of a group have one colour."""


def plot(picture: Bars | Curves, *, path: Path) -> None:
    """Write the benchmark's figure as a PNG."""
    figure = curves_figure(picture) if isinstance(picture, Curves) else bars_figure(picture)
    figure.savefig(path, dpi=DPI)


def curves_figure(picture: Curves) -> Figure:
    """Left: each category by length, and the mean of all tasks. Right: every task by length, as numbers."""
    height = 1.4 + 0.25 * max(len(picture.tasks), 9)
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained", facecolor="white")
    curves, grid = figure.subplots(1, 2, width_ratios=(5, 4))
    _draw_curves(curves, picture)
    _draw_grid(grid, picture)
    return figure


def _draw_curves(axes: Axes, picture: Curves) -> None:
    places = range(len(picture.lengths))
    for number, ((category, means), (colour, marker)) in enumerate(
        zip(picture.categories.items(), _CURVES, strict=False)
    ):
        aside = 0.07 * (number - (len(picture.categories) - 1) / 2)  # equal curves stay apart
        known = [(place + aside, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, label=category)
    axes.plot(places, picture.means, color=INK, marker="o", markersize=5, linewidth=2.5, label="all tasks", zorder=1)
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(-0.4, len(places) - 0.6)
    axes.set_xticks(places, picture.lengths)
    axes.set_xlabel("context length, tokens", fontsize=10)
    axes.set_ylabel("score, percent", fontsize=10)
    axes.set_title(picture.title, fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=5, fontsize=9, frameon=False)


def _draw_grid(axes: Axes, picture: Curves) -> None:
    values = [[float("nan") if value is None else value for value in of_task] for of_task in picture.tasks.values()]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=200, aspect="auto")  # up to 200: dark ink is read on all cells
    for row, of_task in enumerate(values):
        for column, value in enumerate(of_task):
            text = "-" if value != value else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=INK)
    axes.set_xticks(range(len(picture.lengths)), picture.lengths)
    axes.set_yticks(range(len(picture.tasks)), list(picture.tasks))
    axes.set_xlabel("context length, tokens", fontsize=10)
    axes.set_title("every task, percent", fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, length=0, colors=INK)
    axes.spines[:].set_visible(False)


def bars_figure(picture: Bars) -> Figure:
    """Upright bars with the chance of guessing, or lying ones."""
    names = [name for group in picture.groups for name in group]
    height = 1 + 0.28 * len(names) if picture.lying else 3.4
    figure = Figure(figsize=(WIDTH_IN * 0.75, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    (_draw_lying if picture.lying else _draw_upright)(axes, picture, names)
    axes.set_title(picture.title, fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, colors=INK)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_upright(axes: Axes, picture: Bars, names: list[str]) -> None:
    colours = [shade for shades in _SHADES for shade in shades]
    for place, (name, colour) in enumerate(zip(names, colours, strict=False)):
        value = picture.values[name]
        axes.bar(place, value or 0, color=colour, width=0.7)
        axes.text(place, (value or 0) + 1, "-" if value is None else f"{value:.1f}", ha="center", fontsize=9, color=INK)
    if picture.chance is not None:
        axes.axhline(picture.chance, color=FAINT_INK, linewidth=1, linestyle="--")
        axes.text(len(names) - 0.5, picture.chance + 1, "guessing", fontsize=9, color=FAINT_INK)
    axes.set_xticks(range(len(names)), [f"{name}\n{counted_as(picture.counts[name], 'item')}" for name in names])
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(-0.6, len(names) + 0.2)
    axes.set_ylabel(picture.axis, fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)


def _draw_lying(axes: Axes, picture: Bars, names: list[str]) -> None:
    colours = {name: colour for group, (colour, _) in zip(picture.groups, _CURVES, strict=True) for name in group}
    for place, name in enumerate(names):
        value = picture.values[name]
        axes.barh(place, value or 0, color=colours[name], height=0.7)
        text = "-" if value is None else f"{value:.1f}"
        axes.text((value or 0) + 1, place, text, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), [f"{name} ({picture.counts[name]})" for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(picture.axis, fontsize=10)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
