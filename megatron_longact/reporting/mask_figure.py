"""The picture of a mask over time. Needs matplotlib (the `plots` extra); without pyplot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_longact.reporting.figures import INK, WIDTH_IN

Curve = Sequence[float | None]


def mask_figure(places: Sequence[float], *, before: Curve, first: Curve, ever: Curve, along: str) -> Figure:
    """Two panels: overlap of each mask with the one before and with the first; rows that were ever in one.

    places: where each lies, as many as of each curve; None is left out. along: what the places are.
    """
    figure = Figure(figsize=(WIDTH_IN, 3.0), layout="constrained", facecolor="white")
    overlaps, rows = figure.subplots(1, 2)
    overlaps.plot(*_known(places, before), color="#0072b2", linewidth=1.6, label="with the one before")
    overlaps.plot(*_known(places, first), color="#d55e00", linewidth=1.6, label="with the first")
    overlaps.legend(fontsize=9, frameon=False)
    _finish(overlaps, "overlap of the mask (Jaccard)", along)
    rows.plot(*_known(places, ever), color="#009e73", linewidth=1.6)
    rows.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(rows, "Q and K rows that were ever in it", along)
    return figure


def _known(places: Sequence[float], values: Curve) -> tuple[list[float], list[float]]:
    pairs = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    return [place for place, _ in pairs], [value for _, value in pairs]


def _finish(axes: Axes, title: str, along: str) -> None:
    axes.set_ylim(0, 1.03)
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axes.set_xlabel(along, fontsize=10)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
