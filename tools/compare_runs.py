"""Compare runs of the RL program with LongAct and without it, seed by seed: held-out accuracy before and after.

python tools/compare_runs.py --longact runs/demo runs/seeds/longact-2 --dense runs/seeds/dense-1 runs/seeds/dense-2
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The held-out evaluations of a run, first to last."""
    if not (run / "evaluations.jsonl").is_file():
        sys.exit(f"{run} is no run with held-out evaluations: it has no evaluations.jsonl")
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def accuracies(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Held-out accuracy in percent before and after, by context length and "overall"."""
    first, last = evaluations(run)[0], evaluations(run)[-1]
    before, after = (
        {
            **{f"{n} tokens": 100 * value for n, value in row["accuracy_by_length"].items()},
            "overall": 100 * row["accuracy"],
        }
        for row in (first, last)
    )
    return before, after


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.1f} ± {deviation:.1f}"


def table(longact: list[Path], dense: list[Path]) -> str:
    """A Markdown table: one row a context length, gains in points; the last column pairs the seeds."""
    runs = {name: [accuracies(run) for run in paths] for name, paths in (("longact", longact), ("dense", dense))}
    lines = [
        "| held-out accuracy | before | gain with LongAct | gain without | LongAct minus dense, by seed |",
        "|---|---|---|---|---|",
    ]
    for label in runs["longact"][0][0]:
        gains = {name: [after[label] - before[label] for before, after in each] for name, each in runs.items()}
        paired = [a - b for a, b in zip(gains["longact"], gains["dense"], strict=True)]
        before = statistics.mean(before[label] for before, _ in runs["longact"])
        each = ", ".join(f"{value:+.1f}" for value in paired)
        cells = [
            label,
            f"{before:.1f} %",
            spread(gains["longact"]),
            spread(gains["dense"]),
            f"{spread(paired)} ({each})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longact", type=Path, nargs="+", required=True)
    parser.add_argument("--dense", type=Path, nargs="+", required=True, help="in the same order of seeds")
    args = parser.parse_args()
    if len(args.longact) != len(args.dense):
        parser.error(f"runs are compared in pairs: --longact has {len(args.longact)}, --dense {len(args.dense)}")
    print(table(args.longact, args.dense))
