"""Pictures of overlaps: a matrix for each axis, and curves. Needs matplotlib (the `plots` extra); without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from megatron_longact.analysis.observe.plots import style
from megatron_longact.analysis.stability.movement import Movement
from megatron_longact.analysis.stability.overlap import Overlap
from megatron_longact.reporting.figures import DPI, FAINT_INK, INK, WIDTH_IN
from megatron_longact.reporting.mask_figure import mask_figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_NUMBERS = 9
"""Choices of an axis up to which every cell of its matrix has its number."""
MOST_MARKERS = 16
"""Points of a curve up to which each has its marker."""
ALONG = {"context lengths": "context length", "checkpoints": "checkpoint", "runs' own masks": "checkpoint"}
"""Axes with an order: what it is called."""


def write(overlaps: Sequence[Overlap], moved: Sequence[Movement], folder: Path) -> None:
    """matrices.png and curves.png; masks.png of the first movement, if there is one."""
    matrices_figure(overlaps).savefig(folder / "matrices.png", dpi=DPI)
    curves_figure(overlaps).savefig(folder / "curves.png", dpi=DPI)
    if moved:
        movement_figure(moved[0]).savefig(folder / "masks.png", dpi=DPI)


def movement_figure(moved: Movement) -> Figure:
    """Masks one after another."""
    return mask_figure(
        range(len(moved.names)),
        before=[None, *moved.with_before],
        first=[None, *moved.with_first],
        ever=moved.ever,
        along=f"{moved.axis}: from {moved.names[0]} to {moved.names[-1]}",
    )


def matrices_figure(overlaps: Sequence[Overlap]) -> Figure:
    """The Jaccard overlap of every two choices, a panel an axis."""
    columns = min(2, len(overlaps))
    rows = -(-len(overlaps) // columns)
    figure = Figure(figsize=(WIDTH_IN, 0.4 + 3.0 * rows), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False)
    norm = Normalize(0, 1)
    for place, axes in enumerate(panels.flat):
        if place < len(overlaps):
            _draw_matrix(axes, overlaps[place], norm)
        else:
            axes.set_axis_off()
    bar = figure.colorbar(ScalarMappable(norm, "Blues"), ax=panels, aspect=40)
    bar.set_label("Jaccard overlap of the selected rows", fontsize=10)
    bar.ax.tick_params(labelsize=9, colors=INK)
    chance = overlaps[0].mean_chance
    bar.ax.axhline(chance, color=INK, linewidth=1.5)
    ticks = [tick for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0) if abs(tick - chance) > 0.06]
    bar.set_ticks([*ticks, chance], labels=[*(f"{tick:.1f}" for tick in ticks), "chance"])
    return figure


def _draw_matrix(axes: Axes, overlap: Overlap, norm: Normalize) -> None:
    axes.imshow(overlap.jaccard.numpy(), cmap="Blues", norm=norm, aspect="auto")
    count = len(overlap.names)
    if count <= MOST_NUMBERS:
        for i in range(count):
            for j in range(count):
                value = float(overlap.jaccard[i, j])
                colour = "white" if value > 0.6 else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    shown = list(range(0, count, -(-count // 12)))
    names = [overlap.names[i] for i in shown]
    axes.set_yticks(shown, names)
    axes.set_xticks(shown, names, rotation=35, ha="right", rotation_mode="anchor")
    style(axes, f"{overlap.axis} (chance {overlap.mean_chance:.2f})")
    axes.grid(visible=False)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)


def curves_figure(overlaps: Sequence[Overlap]) -> Figure:
    """Mean overlap by layer, Q and K; and for axes with an order, every choice against the first."""
    ordered = [each for each in overlaps if each.axis in ALONG]
    rows = 1 + -(-len(ordered) // 2)
    figure = Figure(figsize=(WIDTH_IN, 0.6 + 2.9 * rows), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, 2, squeeze=False)
    for part, (axes, name) in enumerate(zip(panels[0], ("Q", "K"), strict=True)):
        for i, each in enumerate(overlaps):
            behind = len(overlaps) - 1 - i  # equal curves lie one around the other
            _draw_curve(axes, list(each.layer_numbers), each.layers[part].tolist(), i, each.axis, behind=behind)
        layers = overlaps[0].layer_numbers
        axes.set_xticks(layers[:: -(-len(layers) // 9)])
        axes.set_xlabel("layer, from 0", fontsize=10)
        _finish_curve(axes, f"{name} rows, mean of all pairs", overlaps[0].mean_chance)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    for place, axes in enumerate(panels[1:].flat):
        if place < len(ordered):
            each = ordered[place]
            _draw_curve(
                axes, list(range(len(each.names))), each.jaccard[0].tolist(), list(overlaps).index(each), each.axis
            )
            step = -(-len(each.names) // 6)
            axes.set_xticks(range(0, len(each.names), step), each.names[::step])
            axes.set_xlabel(ALONG[each.axis], fontsize=10)
            _finish_curve(axes, f"{each.axis}: against {each.names[0]}", each.mean_chance)
        else:
            axes.set_axis_off()
    return figure


def _draw_curve(axes: Axes, xs: list[int], ys: list[float], place: int, label: str, *, behind: int = 0) -> None:
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)] if len(xs) <= MOST_MARKERS else ""
    axes.plot(xs, ys, color=colour, marker=marker, markersize=5 + behind, linewidth=1.6 + behind, label=label)


def _finish_curve(axes: Axes, title: str, chance: float) -> None:
    axes.axhline(chance, color=FAINT_INK, linewidth=1, linestyle="--")
    axes.text(0.99, chance + 0.015, "chance", ha="right", va="bottom", fontsize=9, color=FAINT_INK,
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylim(0, 1.03)
    axes.margins(x=0.12)
    axes.set_ylabel("Jaccard overlap", fontsize=10)
    style(axes, title)
