"""Curves and a table of `examples/objectives/compare.sh`: every objective with LongAct and without it.

python tools/plot_objectives.py runs/objectives --output docs/images/objectives.png
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_longact.rl import POLICY_LOSSES

OBJECTIVES = tuple(name.replace("-", "_") for name in POLICY_LOSSES)
ARMS = {"longact": ("LongAct", "#d55e00", "-"), "dense": ("dense", "#0072b2", "--")}
PANELS = {
    "reward_mean": "reward",
    "entropy": "entropy, nats",
    "kl_old": "KL to the sampler, nats",
    "acted_on": "clipped or selected, %",
}
INK = "#222222"

Runs = dict[tuple[str, str], dict[int, Path]]
"""By objective and arm: the folder of each seed."""


def find_runs(folder: Path) -> Runs:
    """The finished runs in a folder; `SystemExit` if there is none."""
    runs: Runs = defaultdict(dict)
    for report in folder.glob("*/report.md"):
        objective, arm, seed = report.parent.name.rsplit("-", 2)
        if objective in OBJECTIVES and arm in ARMS:
            runs[objective, arm][int(seed)] = report.parent
    if not runs:
        raise SystemExit(f"{folder} holds no finished run; examples/objectives/compare.sh makes them")
    return runs


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A JSON-lines file of a run, with what clips and selections touched in percent as `acted_on`."""
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    for row in rows:
        row["acted_on"] = 100 * ((row.get("clip_fraction") or 0.0) + (row.get("selected_fraction") or 0.0))
    return rows


def figure_of(runs: Runs) -> Figure:
    """A column an objective, a row a metric; a line a seed."""
    objectives = [name for name in OBJECTIVES if any(key[0] == name for key in runs)]
    figure = Figure(figsize=(2.1 * len(objectives) + 0.6, 7.2), layout="constrained", facecolor="white")
    panels = figure.subplots(len(PANELS), len(objectives), sharex=True, sharey="row", squeeze=False)
    for column, objective in enumerate(objectives):
        for line, (metric, label) in enumerate(PANELS.items()):
            axes = panels[line][column]
            for arm, (name, colour, style) in ARMS.items():
                for index, (_, run) in enumerate(sorted(runs[objective, arm].items())):
                    rows = rows_of(run)
                    x, y = [row["iteration"] for row in rows], [row[metric] for row in rows]
                    axes.plot(x, y, style, color=colour, linewidth=1.3, alpha=0.9, label=None if index else name)
            if line == 0:
                axes.set_title(objective.replace("_", "-"), fontsize=11, fontweight="bold", color=INK)
            if column == 0:
                axes.set_ylabel(label, fontsize=10, color=INK)
            if line == len(PANELS) - 1:
                axes.set_xlabel("optimizer step", fontsize=10, color=INK)
            axes.tick_params(labelsize=9, colors=INK)
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=9, frameon=False, loc="lower right")
    return figure


def accuracy(run: Path) -> tuple[float, float]:
    """Held-out accuracy in percent before and after."""
    rows = rows_of(run, "evaluations.jsonl")
    return 100 * rows[0]["accuracy"], 100 * rows[-1]["accuracy"]


def frozen_rows_changed(run: Path) -> str:
    """What the report counted, such as `0 of 383`; a dense run freezes none."""
    found = re.search(r"frozen rows changed \| (\d+ of \d+)", (run / "report.md").read_text())
    return found.group(1) if found else "none frozen"


def cell(runs: dict[int, Path]) -> str:
    """Gain over the seeds: mean, and each in brackets."""
    gains = [after - before for before, after in map(accuracy, (runs[seed] for seed in sorted(runs)))]
    return f"{statistics.mean(gains):+.1f} ({', '.join(f'{gain:+.1f}' for gain in gains)})" if gains else "none"


def table(runs: Runs) -> str:
    """Gains in points of held-out accuracy by objective, the last entropy, and the frozen rows."""
    lines = ["| objective | gain with LongAct | gain without | last entropy, with and without | frozen rows changed |"]
    lines.append("|---|---|---|---|---|")
    for objective in OBJECTIVES:
        longact, dense = runs[objective, "longact"], runs[objective, "dense"]
        if not longact and not dense:
            continue
        entropies = [
            f"{statistics.mean(rows_of(run)[-1]['entropy'] for run in arm.values()):.2f}" if arm else "none"
            for arm in (longact, dense)
        ]
        frozen = ", ".join(frozen_rows_changed(longact[seed]) for seed in sorted(longact))
        lines.append(
            f"| {objective.replace('_', '-')} | {cell(longact)} | {cell(dense)} | {' / '.join(entropies)} | {frozen} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with one folder a run")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives.png"))
    args = parser.parse_args()
    runs = find_runs(args.runs)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure_of(runs).savefig(args.output, dpi=120)
    print(table(runs))


if __name__ == "__main__":
    main()
