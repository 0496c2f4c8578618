"""What came out of examples/ablation/run.sh: means with intervals, paired differences by seed, and what would tell.

    python tools/report_ablation.py runs/ablation

Held-out accuracy after training, in percent. Runs of one seed have the same tasks, held-out prompts and start model, so
selectors are compared seed by seed. All intervals are Student's t, 95 % each, and not corrected for how many there are.
--unfinished takes runs that have not ended as well, each seed's at the last evaluation that all its selectors have.
Written into the folder, or --output: ablation.md, ablation.json, ablation.png.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_longact.reporting.paired_statistics import Mean, mean_of, prompts_needed, seeds_needed

SELECTORS = {
    "high": ("#d55e00", "s"),
    "low": ("#0072b2", "^"),
    "random": ("#009e73", "D"),
    "random-fixed": ("#56b4e9", "v"),
    "weight-norm": ("#cc79a7", "P"),
    "gradient": ("#e69f00", "X"),
    "high-fixed": ("#a05010", "p"),
    "dense": ("#555555", "o"),
}
"""In this order; Okabe and Ito's colours, and a marker each."""
REFERENCE = "high"
TOGETHER = "all objectives"
INK = "#222222"
LONG = "interval of two seeds"


@dataclass(frozen=True)
class Run:
    """Held-out accuracy before and after in percent, over so many prompts, and the reward of each step."""

    before: float
    after: float
    prompts: int
    rewards: list[float]
    answers: list[float]
    """Reward of each held-out prompt afterwards; none in older logs."""


Runs = dict[str, dict[str, dict[int, Run]]]
"""By objective, selector and seed."""


@dataclass(frozen=True)
class Difference:
    """`high` minus another selector, in points, over the seeds that both have; what would tell such a difference."""

    objective: str
    selector: str
    points: Mean
    seeds_needed: int | None
    prompts_needed: int | None

    @property
    def told(self) -> bool:
        """Whether zero lies outside the interval; never without scatter, which only few prompts or seeds can give."""
        low, high = self.points.low, self.points.high
        return bool(self.points.std) and low is not None and high is not None and low * high > 0


# -- runs ----------------------------------------------------------------------------------------------


def find_runs(folder: Path, *, unfinished: bool = False) -> Runs:
    """The finished runs, or also those that have trained and were looked at; `ValueError` if there is none."""
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    paths = [
        path.parent for path in sorted(folder.glob(f"*/*/seed-*/{'metrics.jsonl' if unfinished else 'report.md'}"))
    ]
    paths = [path for path in paths if path.parts[-2] in SELECTORS and (not unfinished or _evaluated(path)[-1:] > [0])]
    for path in paths:
        objective, selector, seed = path.parts[-3:]
        others = [each for each in paths if (each.parts[-3], each.parts[-1]) == (objective, seed)]
        until = min(_evaluated(each)[-1] for each in others) if unfinished else None
        runs[objective][selector][int(seed.removeprefix("seed-"))] = read_run(path, until=until)
    if not runs:
        raise ValueError(f"{folder} holds no finished run; examples/ablation/run.sh makes them")
    return runs


def read_run(folder: Path, *, until: int | None = None) -> Run:
    """One run's folder; until: the iteration of the evaluation that counts, None for the last one."""
    rows = {name: _rows(folder / f"{name}.jsonl") for name in ("evaluations", "metrics")}
    if until is not None:
        rows = {name: [row for row in of if row["iteration"] <= until] for name, of in rows.items()}
    first, last = rows["evaluations"][0], rows["evaluations"][-1]
    return Run(
        before=100 * first["accuracy"],
        after=100 * last["accuracy"],
        prompts=int(last["prompts"]),
        rewards=[row["reward_mean"] for row in rows["metrics"]],
        answers=list(last.get("rewards", ())),
    )


def _evaluated(folder: Path) -> list[int]:
    """The iterations that a run has evaluations of."""
    path = folder / "evaluations.jsonl"
    return [row["iteration"] for row in _rows(path)] if path.exists() else []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def selectors_of(runs: Runs) -> list[str]:
    """The selectors that have runs, in their order."""
    return [name for name in SELECTORS if any(runs[objective].get(name) for objective in runs)]


def differences(runs: Runs) -> list[Difference]:
    """`high` minus every other selector, by objective and over all of them."""
    found = []
    for selector in selectors_of(runs):
        if selector == REFERENCE:
            continue
        by_seed: dict[int, list[float]] = defaultdict(list)
        compared = 0
        for objective, arms in runs.items():
            high, other = arms.get(REFERENCE, {}), arms.get(selector, {})
            seeds = sorted(set(high) & set(other))
            if not seeds:
                continue
            compared += 1
            points = [high[seed].after - other[seed].after for seed in seeds]
            for seed, point in zip(seeds, points, strict=True):
                by_seed[seed].append(point)
            ends = tuple(statistics.fmean(arm[seed].after for seed in seeds) for arm in (high, other))
            found.append(_difference(objective, selector, points, ends))
        whole = [statistics.fmean(points) for points in by_seed.values() if len(points) == compared]
        if compared > 1 and whole:
            found.append(_difference(TOGETHER, selector, whole, None))
    return found


def _difference(
    objective: str, selector: str, points: Sequence[float], accuracies: tuple[float, ...] | None
) -> Difference:
    mean = mean_of(points)
    prompts = None if accuracies is None else prompts_needed(mean.mean, (accuracies[0], accuracies[1]))
    return Difference(objective, selector, mean, seeds_needed(mean.mean, mean.std), prompts)


@dataclass(frozen=True)
class Paired:
    """`high` minus another selector in points of reward, prompt by prompt, over the seeds that both have.

    answered_apart: share of the prompts that the two do not get the same reward for, in percent. The interval is that
    of the prompts: it says what these very models differ by, and nothing of what another training would make of them.
    """

    objective: str
    selector: str
    points: Mean
    answered_apart: float


def paired_by_prompt(runs: Runs) -> list[Paired]:
    """Of every comparison whose runs have the rewards of their prompts."""
    found = []
    for objective, arms in runs.items():
        for selector in selectors_of(runs):
            high, other = arms.get(REFERENCE, {}), arms.get(selector, {})
            seeds = [s for s in sorted(set(high) & set(other)) if high[s].answers and other[s].answers]
            if selector == REFERENCE or not seeds:
                continue
            pairs = [pair for s in seeds for pair in zip(high[s].answers, other[s].answers, strict=True)]
            points = mean_of([100 * (a - b) for a, b in pairs])
            found.append(Paired(objective, selector, points, 100 * statistics.fmean(a != b for a, b in pairs)))
    return found


# -- report --------------------------------------------------------------------------------------------


def report(runs: Runs) -> str:
    """Markdown: accuracies, paired differences, and what can be said."""
    found = differences(runs)
    paired = paired_by_prompt(runs)
    parts = ["# Ablation", accuracy_table(runs), difference_table(found)]
    parts += [prompt_table(paired)] if paired else []
    return "\n\n".join([*parts, verdict(found)]) + "\n"


def accuracy_table(runs: Runs) -> str:
    """Objectives down, selectors across."""
    names = selectors_of(runs)
    counts = sorted({run.prompts for arms in runs.values() for arm in arms.values() for run in arm.values()})
    lines = [
        f"Held-out accuracy after training, percent over {' or '.join(map(str, counts))} prompts: mean and 95 % "
        "interval over seeds, and how many seeds.\n",
        f"| objective | at the start | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for objective, arms in runs.items():
        starts = {seed: run.before for arm in arms.values() for seed, run in arm.items()}
        cells = [_accuracy(arms.get(name, {})) for name in names]
        lines.append(f"| {objective} | {statistics.fmean(starts.values()):.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(arm: Mapping[int, Run]) -> str:
    if not arm:
        return "-"
    mean = mean_of([run.after for run in arm.values()])
    if mean.low is None or mean.high is None:
        return f"{mean.mean:.1f} (1)"
    return f"{mean.mean:.1f} ± {mean.high - mean.mean:.1f} ({mean.n})"


def _points(mean: Mean) -> str:
    """Three columns: the mean, its interval, and of how many."""
    ends = "-" if mean.low is None or mean.high is None else f"{mean.low:+.1f} to {mean.high:+.1f}"
    return f"{mean.mean:+.1f} | {ends} | {mean.n}"


def difference_table(found: Sequence[Difference]) -> str:
    """A line a comparison."""
    lines = [
        f"Points by which `{REFERENCE}` is ahead, seed by seed, and what would tell a difference of that size apart "
        "from none (5 %, power 80 %).\n",
        "| objective | against | points | 95 % interval | seeds | seeds needed | prompts needed |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        needed = ["-" if n is None else f"{n:,}" for n in (each.seeds_needed, each.prompts_needed)]
        lines.append(f"| {each.objective} | {each.selector} | {_points(each.points)} | {' | '.join(needed)} |")
    lines.append(
        "\nSeeds needed: with as many held-out prompts a seed as here. Prompts needed: for the prompts' own noise "
        "alone, were training without any."
    )
    return "\n".join(lines)


def prompt_table(found: Sequence[Paired]) -> str:
    """A line a comparison, prompt by prompt."""
    lines = [
        f"Points of reward by which `{REFERENCE}` is ahead, prompt by prompt: what these very models differ by. The "
        "interval is that of the prompts and knows nothing of the scatter between trainings.\n",
        "| objective | against | points | 95 % interval | prompts | answered apart |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        apart = f"{each.answered_apart:.0f} %"
        lines.append(f"| {each.objective} | {each.selector} | {_points(each.points)} | {apart} |")
    return "\n".join(lines)


def verdict(found: Sequence[Difference]) -> str:
    """In words: which differences are told, and which are not."""
    if not found:
        return f"Nothing to compare: no seed has both `{REFERENCE}` and another selector."
    lines = []
    for each in found:
        mean, name = each.points, f"{each.objective}: `{REFERENCE}` against `{each.selector}`"
        if mean.low is None:
            lines.append(f"- {name}: one seed says nothing ({mean.mean:+.1f} points).")
        elif each.told:
            lines.append(f"- {name}: {'better' if mean.mean > 0 else 'worse'} by {abs(mean.mean):.1f} points.")
        else:
            wanted = f"; {each.seeds_needed:,} seeds would tell it" if each.seeds_needed else ""
            lines.append(f"- {name}: no difference can be told ({mean.mean:+.1f} points over {mean.n} seeds{wanted}).")
    told = sum(each.told for each in found)
    lines.append(f"\n{told} of {len(found)} comparisons are told apart; by chance alone one in twenty would be.")
    return "\n".join(lines)


# -- picture -------------------------------------------------------------------------------------------


def figure_of(runs: Runs) -> Figure:
    """A column an objective: accuracy by selector, differences from `high`, and the reward on the way.

    Dots are seeds, thin lines 95 % intervals over them, broad ones those of the held-out prompts alone.
    """
    columns, found, paired = len(runs), differences(runs), paired_by_prompt(runs)
    figure = Figure(figsize=(max(3.2 * columns, 4.5), 8.4), layout="constrained", facecolor="white")
    panels = figure.subplots(3, columns, sharey="row", squeeze=False)
    for column, (objective, arms) in enumerate(runs.items()):
        _draw_accuracies(panels[0][column], arms, selectors_of(runs))
        panels[0][column].set_title(objective.replace("_", "-"), fontsize=11, fontweight="bold", color=INK)
        own = [each for each in found if each.objective == objective]
        by_prompt = {each.selector: each.points for each in paired if each.objective == objective}
        _draw_differences(panels[1][column], own, arms, by_prompt)
        _draw_rewards(panels[2][column], arms, selectors_of(runs))
    labels = ("held-out accuracy, percent", f"{REFERENCE} minus other, points", "reward, mean over seeds")
    for row, label in zip(panels, labels, strict=True):
        row[0].set_ylabel(label, fontsize=10, color=INK)
        for axes in row:
            _finish(axes)
    for row in panels[:2]:
        _leave_out_long_lines(row[0])
    low, high = panels[0][0].get_ylim()
    panels[0][0].set_ylim(max(low, 0), min(high, 102))
    curves = {line.get_label(): line for axes in panels[2] for line in axes.lines}
    names = [name for name in selectors_of(runs) if name in curves]
    figure.legend(
        [curves[name] for name in names],
        names,
        loc="outside lower left",
        ncols=min(len(names), 4 if columns == 1 else 6),
        fontsize=9,
        frameon=False,
    )
    return figure


def _draw_accuracies(axes: Axes, arms: Mapping[str, Mapping[int, Run]], names: Sequence[str]) -> None:
    starts = [run.before for arm in arms.values() for run in arm.values()]
    axes.axhline(statistics.fmean(starts), color="#777777", linestyle=":", linewidth=1.2)
    for place, name in enumerate(names):
        values = [run.after for run in arms.get(name, {}).values()]
        if values:
            _draw_mean(axes, place, values, name)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_xlim(-0.6, len(names) - 0.4)


def _draw_differences(
    axes: Axes, found: Sequence[Difference], arms: Mapping[str, Mapping[int, Run]], by_prompt: Mapping[str, Mean]
) -> None:
    axes.axhline(0, color="#777777", linestyle=":", linewidth=1.2)
    for place, each in enumerate(found):
        high, other = arms[REFERENCE], arms[each.selector]
        of_prompts = by_prompt.get(each.selector)
        if of_prompts and of_prompts.low is not None and of_prompts.high is not None:
            ends = (of_prompts.low, of_prompts.high)
            axes.plot(
                [place + 0.22] * 2,
                ends,
                color=SELECTORS[each.selector][0],
                linewidth=5,
                solid_capstyle="butt",
                alpha=0.4,
            )
        _draw_mean(axes, place, [high[s].after - other[s].after for s in set(high) & set(other)], each.selector)
    axes.set_xticks(range(len(found)), [each.selector for each in found], rotation=30, ha="right")
    axes.set_xlim(-0.6, max(len(found), 1) - 0.4)


def _draw_mean(axes: Axes, place: int, values: Sequence[float], name: str) -> None:
    colour, marker = SELECTORS[name]
    mean = mean_of(values)
    axes.plot([place - 0.22] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.55)
    if mean.low is not None and mean.high is not None:
        gid = LONG if mean.n == 2 else None
        axes.plot([place, place], [mean.low, mean.high], color=colour, linewidth=1.6, gid=gid)
    axes.plot(place, mean.mean, marker, color=colour, markersize=7)


def _leave_out_long_lines(axes: Axes) -> None:
    """Limits of a row of panels, in which the intervals of two seeds, 12.7 standard errors, run out of the picture."""
    ends = [
        float(y)
        for panel in axes.get_shared_y_axes().get_siblings(axes)
        for line in panel.lines
        if line.get_gid() != LONG
        for y in line.get_ydata()
    ]
    room = 0.12 * (max(ends) - min(ends)) or 1.0
    axes.set_ylim(min(ends) - room, max(ends) + room)


def _draw_rewards(axes: Axes, arms: Mapping[str, Mapping[int, Run]], names: Sequence[str]) -> None:
    for name in names:
        curves = [run.rewards for run in arms.get(name, {}).values()]
        if curves:
            means = [statistics.fmean(step) for step in zip(*curves, strict=False)]
            style = "--" if name == "dense" else "-"
            axes.plot(range(1, len(means) + 1), means, style, color=SELECTORS[name][0], linewidth=1.4, label=name)
    axes.set_xlabel("optimizer step", fontsize=10, color=INK)


def _finish(axes: Axes) -> None:
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# -- the tool ------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Write table, JSON and picture; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of examples/ablation/run.sh")
    parser.add_argument("--output", type=Path, help="folder for what is written; default: the runs' folder")
    parser.add_argument("--unfinished", action="store_true", help="runs that have not ended as well")
    args = parser.parse_args(argv)
    try:
        runs = find_runs(args.runs, unfinished=args.unfinished)
    except ValueError as error:
        print(f"report_ablation: {error}", file=sys.stderr)
        return 1
    output: Path = args.output or args.runs
    output.mkdir(parents=True, exist_ok=True)
    text = report(runs)
    (output / "ablation.md").write_text(text)
    plain = {
        o: {s: {seed: asdict(run) for seed, run in arm.items()} for s, arm in arms.items()} for o, arms in runs.items()
    }
    values = {"runs": plain, "differences": [asdict(each) | {"told": each.told} for each in differences(runs)]}
    values["by_prompt"] = [asdict(each) for each in paired_by_prompt(runs)]
    (output / "ablation.json").write_text(json.dumps(values, indent=2) + "\n")
    figure_of(runs).savefig(output / "ablation.png", dpi=150)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
