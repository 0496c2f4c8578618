"""Pictures of scores by length. Needs matplotlib (the `plots` extra); made without pyplot, as `rl.plots`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_longact.evaluation.report import Results
from megatron_longact.reporting.figures import DPI, FAINT_INK, INK, WIDTH_IN
from megatron_longact.tasks.longbench_v2 import BUCKETS
from megatron_longact.tasks.ruler.tasks import TASKS

CATEGORIES = {
    "retrieval": ("#0072b2", "o"),
    "tracing": ("#d55e00", "s"),
    "aggregation": ("#009e73", "^"),
    "question answering": ("#cc79a7", "D"),
}
"""Okabe and Ito's colours, and a marker each."""


def plot(results: Results, *, path: Path) -> None:
    """Write the benchmark's figure as a PNG."""
    figure = ruler_figure(results) if results["benchmark"] == "ruler" else longbench_figure(results)
    figure.savefig(path, dpi=DPI)


def ruler_figure(results: Results) -> Figure:
    """Left: the mean of each category by length, and of all tasks. Right: every task by length, as numbers."""
    lengths = list(results["scores"])
    tasks = [task for task in TASKS if any(task in results["scores"][length] for length in lengths)]
    figure = Figure(figsize=(WIDTH_IN, 1.4 + 0.25 * max(len(tasks), 9)), layout="constrained", facecolor="white")
    curves, grid = figure.subplots(1, 2, width_ratios=(5, 4))
    _draw_curves(curves, results, lengths)
    _draw_grid(grid, results, lengths, tasks)
    return figure


def _draw_curves(axes: Axes, results: Results, lengths: list[str]) -> None:
    places = range(len(lengths))
    for number, (category, (colour, marker)) in enumerate(CATEGORIES.items()):
        means = [_category_mean(results["scores"][length], category) for length in lengths]
        aside = 0.07 * (number - (len(CATEGORIES) - 1) / 2)  # equal curves stay apart
        known = [(place + aside, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, markersize=5, label=category)
    averages = [results["averages"][length] for length in lengths]
    axes.plot(places, averages, color=INK, marker="o", markersize=5, linewidth=2.5, label="all tasks", zorder=1)
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(-0.4, len(lengths) - 0.6)
    axes.set_xticks(places, [_name(length) for length in lengths])
    axes.set_xlabel("context length, tokens", fontsize=10)
    axes.set_ylabel("score, percent", fontsize=10)
    axes.set_title("RULER by category", fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=5, fontsize=9, frameon=False)


def _draw_grid(axes: Axes, results: Results, lengths: list[str], tasks: list[str]) -> None:
    values = [[results["scores"][length].get(task, float("nan")) for length in lengths] for task in tasks]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=200, aspect="auto")  # up to 200: dark ink is read on all cells
    for row, of_task in enumerate(values):
        for column, value in enumerate(of_task):
            text = "-" if value != value else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=INK)
    axes.set_xticks(range(len(lengths)), [_name(length) for length in lengths])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("context length, tokens", fontsize=10)
    axes.set_title("every task, percent", fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, length=0, colors=INK)
    axes.spines[:].set_visible(False)


def _category_mean(scores: dict[str, float], category: str) -> float | None:
    own = [score for task, score in scores.items() if TASKS[task].category == category]
    return sum(own) / len(own) if own else None


def _name(length: str) -> str:
    return "unknown" if length == "0" else length


def longbench_figure(results: Results) -> Figure:
    """Percent right by bucket, with the chance of guessing."""
    figure = Figure(figsize=(WIDTH_IN * 0.75, 3.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours = {
        "overall": INK,
        "easy": "#56b4e9",
        "hard": "#0072b2",
        "short": "#e69f00",
        "medium": "#d55e00",
        "long": "#8c3b00",
    }
    for place, bucket in enumerate(BUCKETS):
        value = results["scores"][bucket]
        axes.bar(place, value or 0, color=colours[bucket], width=0.7)
        axes.text(place, (value or 0) + 1, "-" if value is None else f"{value:.1f}", ha="center", fontsize=9, color=INK)
    axes.axhline(25, color=FAINT_INK, linewidth=1, linestyle="--")
    axes.text(len(BUCKETS) - 0.5, 26, "guessing", fontsize=9, color=FAINT_INK)
    names = [f"{bucket}\n{results['samples'][bucket]} items" for bucket in BUCKETS]
    axes.set_xticks(range(len(BUCKETS)), names)
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(-0.6, len(BUCKETS) + 0.2)
    axes.set_ylabel("right, percent", fontsize=10)
    axes.set_title("LongBench v2 by difficulty and by length", fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
