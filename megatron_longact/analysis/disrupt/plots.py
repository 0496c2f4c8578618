"""The picture of `longact disrupt`. Needs matplotlib (the `plots` extra); made without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from megatron_longact.reporting.figures import DPI, FAINT_INK, INK, WIDTH_IN
from megatron_longact.tasks.intervals import percent_interval

STYLES = {
    None: ("undisturbed", INK, "o"),
    "high": ("high", "#d55e00", "s"),
    "low": ("low", "#0072b2", "^"),
    "random": ("random", "#009e73", "D"),
}
"""Okabe and Ito's colours, and a marker each."""
REPLACED_BY = {"mean": "their mean", "zero": "zero", "noise": "noise"}

Results = Mapping[str, Any]


def plot(results: Results, *, path: Path) -> None:
    """Write the figure as a PNG."""
    several = any("ratio" in run for run in results["runs"])
    (share_figure if several else disruption_figure)(results).savefig(path, dpi=DPI)


def disruption_figure(results: Results) -> Figure:
    """A row a replacement: accuracy by context length, share of the responses in loops, perplexity."""
    runs: Sequence[Results] = results["runs"]
    replacements = list(dict.fromkeys(run["replacement"] for run in runs if run["replacement"]))
    with_text = runs[0]["perplexity"] is not None
    columns = 3 if with_text else 2
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 2.9 * len(replacements)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(replacements), columns, squeeze=False, width_ratios=(5, 3, 3)[:columns], sharey="col")
    for row, replacement in zip(panels, replacements, strict=True):
        shown = [run for run in runs if run["replacement"] in (None, replacement)]
        _draw_accuracy(row[0], shown, title=f"channels replaced by {REPLACED_BY[replacement]}")
        _draw_bars(row[1], shown, "loop_share", label="tokens in a loop, percent", title="repetition")
        if with_text:
            _draw_bars(row[2], shown, "perplexity", label="perplexity", title="text")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=9, frameon=False)
    return figure


def share_figure(results: Results) -> Figure:
    """A row a replacement: accuracy over all prompts, repetition and perplexity by the share that is replaced."""
    runs: Sequence[Results] = results["runs"]
    replacements = list(dict.fromkeys(run["replacement"] for run in runs if run["replacement"]))
    metrics = [("accuracy", "accuracy, percent"), ("loop_share", "tokens in a loop, percent")]
    metrics += [("perplexity", "perplexity")] if runs[0]["perplexity"] is not None else []
    figure = Figure(figsize=(WIDTH_IN, 0.5 + 2.9 * len(replacements)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(replacements), len(metrics), squeeze=False, sharey="col")
    for row, replacement in zip(panels, replacements, strict=True):
        shown = [run for run in runs if run["replacement"] == replacement]
        for axes, (metric, label) in zip(row, metrics, strict=True):
            _draw_by_share(axes, runs[0], shown, metric, label)
        row[0].set_title(f"replaced by {REPLACED_BY[replacement]}", fontsize=10.5, fontweight="bold", loc="left")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=9, frameon=False)
    return figure


def _draw_by_share(axes: Axes, undisturbed: Results, runs: Sequence[Results], metric: str, label: str) -> None:
    name, colour, _ = STYLES[None]
    axes.axhline(undisturbed[metric], color=colour, linestyle=":", label=name)
    for channels in dict.fromkeys(run["channels"] for run in runs):
        own = [run for run in runs if run["channels"] == channels]
        name, colour, marker = STYLES[channels]
        shares, values = [100 * run["ratio"] for run in own], [run[metric] for run in own]
        axes.plot(shares, values, color=colour, marker=marker, markersize=5, label=name)
        if metric == "accuracy":
            ends = [percent_interval(run[metric], sum(run["samples_by_length"].values())) for run in own]
            axes.vlines(shares, *zip(*ends, strict=True), color=colour, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(sorted({100 * run["ratio"] for run in runs}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("channels replaced, percent", fontsize=10)
    axes.set_ylabel(label, fontsize=10)
    if metric == "accuracy":
        axes.set_ylim(-3, 103)
    if metric == "perplexity":
        _log_y(axes)
    _finish(axes, "")


def _draw_accuracy(axes: Axes, runs: Sequence[Results], *, title: str) -> None:
    lengths = list(runs[0]["accuracy_by_length"])
    for number, run in enumerate(runs):
        label, colour, marker = STYLES[run["channels"]]
        values = [run["accuracy_by_length"][n] for n in lengths]
        ends = [percent_interval(v, run["samples_by_length"][n]) for v, n in zip(values, lengths, strict=True)]
        errors = [
            [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
        ]
        places = [i + 0.05 * (number - (len(runs) - 1) / 2) for i in range(len(lengths))]
        axes.errorbar(places, values, errors, color=colour, marker=marker, markersize=5, capsize=2, label=label)
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(-0.4, len(lengths) - 0.6)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlabel("context length, tokens", fontsize=10)
    axes.set_ylabel("accuracy, percent", fontsize=10)
    _finish(axes, title)


def _draw_bars(axes: Axes, runs: Sequence[Results], metric: str, *, label: str, title: str) -> None:
    for place, run in enumerate(runs):
        _, colour, _ = STYLES[run["channels"]]
        value = run[metric]
        axes.bar(place, value, color=colour, width=0.7)
        axes.annotate(
            f"{value:.3g}", (place, value), (0, 2), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    values = [run[metric] for run in runs]
    if min(values) > 0 and max(values) > 20 * min(values):
        _log_y(axes)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(runs)), [STYLES[run["channels"]][0] for run in runs], rotation=25, ha="right")
    axes.set_ylabel(label, fontsize=10)
    _finish(axes, title)


def _log_y(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10.5, fontweight="bold", loc="left")
    axes.tick_params(labelsize=9, colors=INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT_INK)
