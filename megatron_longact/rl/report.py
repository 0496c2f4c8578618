"""What a run came to, in numbers: the table at its end and report.md. Pure; no Megatron, no communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_longact.tasks.intervals import paired_gain, wilson

REPORT, SALIENCY, REWARD, MASKS = "report.md", "saliency.png", "reward.png", "masks.png"

PICTURES = {
    SALIENCY: "Saliency of each Q and K channel in the last step; orange channels are the ones whose rows trained.",
    REWARD: "Reward of the rollouts, and accuracy on held-out tasks.",
    MASKS: "How the mask moved: its overlap with the step before and with the first one, and the rows ever in it.",
}


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Accuracy in [0, 1] on held-out tasks: over all, and by context length in tokens.

    right: by length, whether each prompt was answered so; empty out of a run from before that was written.
    """

    overall: float
    by_length: Mapping[int, float]
    prompts: int
    right: Mapping[int, Sequence[bool]] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> HeldOutAccuracy:
        """Out of a row of evaluations.jsonl."""
        by_length = {int(length): accuracy for length, accuracy in row["accuracy_by_length"].items()}
        answers, right = iter(row.get("correct", ())), {}
        for length, count in row.get("prompts_by_length", {}).items():
            right[int(length)] = list(islice(answers, count))
        return cls(row["accuracy"], dict(sorted(by_length.items())), row["prompts"], right)

    def of(self, length: int | None) -> tuple[float | None, int, Sequence[bool]]:
        """Accuracy (None: not asked), prompts (0: not known) and right answers (none: not known) of a length.

        None: over all.
        """
        if length is None:
            return self.overall, self.prompts, [*chain.from_iterable(self.right.values())]
        own = self.right.get(length, ())
        return self.by_length.get(length), len(own), own


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The numbers of a finished run.

    rows: Q and K rows of the model; moved: those that differ from the start weights; frozen: those that no
    mask ever let through; frozen_changed: frozen rows that differ from the start weights all the same. since: these
    were counted since that iteration; not 0 where a run goes on from a checkpoint without a count.
    longact_time_share: of the optimizer steps' time, in [0, 1]; None for a run without LongAct.
    pass_at: overall pass@k before and after, by k; empty if it was not measured.
    before, after: None for a run without held-out data.
    expected_gain: points of overall held-out accuracy; the verdict says so if the gain is smaller. None: any.
    """

    before: HeldOutAccuracy | None
    after: HeldOutAccuracy | None
    iterations: int
    rows: int
    moved: int
    frozen: int
    frozen_changed: int
    since: int = 0
    longact_time_share: float | None
    pass_at: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    expected_gain: float | None = None

    @property
    def gain_points(self) -> float | None:
        """Overall gain in percentage points, to the tenth that is shown; None if it was not measured on both sides."""
        if self.before is None or self.after is None or self.before.by_length.keys() != self.after.by_length.keys():
            return None
        return round(100 * (self.after.overall - self.before.overall), 1)

    def verdict(self) -> str:
        """One sentence on the gain, which does not claim more than was reached."""
        gain, needed = self.gain_points, self.expected_gain
        if gain is None:
            why = "nothing was measured, for there is no held-out data (--heldout-data)"
            if self.after is not None:
                why = "no gain was measured: the held-out prompts have not the context lengths that they began with"
            return f"{self.iterations} iterations; {why}."
        moved = f"{'rose' if gain > 0 else 'fell'} by {abs(gain):.1f} points" if gain else "did not change"
        sentence = f"Held-out accuracy {moved} in {self.iterations} iterations"
        if needed is None or gain >= needed:
            return f"{sentence}."
        return f"{sentence}: LESS than the {needed:.0f} points to expect here."


def accuracy_rows(summary: RunOutcome) -> list[tuple[str, str, str, str]]:
    """Context length, before, after and gain in points, with intervals, as text; the last row is over all."""
    before, after = summary.before, summary.after
    if before is None or after is None:
        return []
    lengths = sorted({*before.by_length, *after.by_length})
    rows = [(f"{length} tokens", *_cells(before.of(length), after.of(length))) for length in lengths]
    old, new, gain = _cells(before.of(None), after.of(None))
    return [*rows, (f"all {after.prompts} tasks", old, new, "-" if summary.gain_points is None else gain)]


_Accuracy = tuple[float | None, int, Sequence[bool]]


def _cells(before: _Accuracy, after: _Accuracy) -> tuple[str, str, str]:
    gain = "-" if before[0] is None or after[0] is None else f"{100 * (after[0] - before[0]):+.1f}"
    if before[2] and len(before[2]) == len(after[2]):
        low, high = (100 * end for end in paired_gain(before[2], after[2]))
        gain += f" ({low:+.0f} to {high:+.0f})"
    return _with_interval(*before[:2]), _with_interval(*after[:2]), gain


def _with_interval(share: float | None, prompts: int) -> str:
    if share is None:
        return "-"
    if not prompts:
        return f"{share:.1%}"
    low, high = (100 * end for end in wilson(share, prompts))
    return f"{share:.1%} ({low:.0f}-{high:.0f})"


INTERVALS = (
    "in brackets: 95 % intervals over the prompts, Wilson's score interval, of the gain\n"
    "Newcombe's for pairs; how far another seed would be off they do not say"
)


def fact_rows(summary: RunOutcome) -> list[tuple[str, str]]:
    """What was counted, and the count, as text."""
    moved = f"{summary.moved} of {summary.rows} ({summary.moved / summary.rows:.1%})"
    start = f"those of iteration {summary.since}" if summary.since else "the start weights"
    moved += f" since iteration {summary.since}, where it was started again" if summary.since else ""
    prompts = summary.after.prompts if summary.after else 0
    pass_at = [
        (f"held-out pass@{k}", f"{_with_interval(old, prompts)} before, {_with_interval(new, prompts)} after")
        for k, (old, new) in summary.pass_at.items()
    ]
    if summary.longact_time_share is None:
        return [*pass_at, ("LongAct", "off: every Q/K row trains"), ("Q/K rows that moved", moved)]
    return [
        *pass_at,
        ("Q/K rows that moved", moved),
        ("frozen rows changed", f"{summary.frozen_changed} of {summary.frozen}, against {start}"),
        ("step time that LongAct took", f"{summary.longact_time_share:.1%}"),
    ]


def render_table(summary: RunOutcome) -> str:
    """The table for a terminal, several lines without the last newline."""
    accuracy = [("held-out accuracy", "before", "after", "gain"), *accuracy_rows(summary)]
    lines = [f"{name:<20}{old:>16}{new:>16}{gain:>20}" for name, old, new, gain in accuracy]
    facts = [f"{name:<30}{value}" for name, value in fact_rows(summary)]
    rule = "-" * len(lines[0])
    measured = [lines[0], rule, *lines[1:-1], rule, lines[-1], rule] if lines[1:] else []
    return "\n".join([rule, *measured, *facts, rule, *[INTERVALS] * bool(measured), summary.verdict()])


_ACCURACY_HEAD = ("| held-out accuracy | before | after | gain in points |", "|---|---:|---:|---:|")


def render_markdown(summary: RunOutcome, *, settings: Mapping[str, object], pictures: Mapping[str, str]) -> str:
    """The text of report.md.

    settings: what a reader must know to run it again; pictures: caption by file name, relative to the report.
    """
    accuracy = [f"| {' | '.join(row)} |" for row in accuracy_rows(summary)]
    facts = [f"| {name} | {value} |" for name, value in fact_rows(summary)]
    shown = [f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items()]
    chosen = [f"| {name} | `{value}` |" for name, value in settings.items()]
    parts = [
        "# Report of the run",
        summary.verdict(),
        *(["\n".join([*_ACCURACY_HEAD, *accuracy]), INTERVALS] if accuracy else []),
        "\n".join(["| counted at the end | |", "|---|---|", *facts]),
        *shown,
        "\n".join(["## Settings", "", "| setting | value |", "|---|---|", *chosen]),
    ]
    return "\n\n".join(parts) + "\n"


def write_report(
    path: Path, summary: RunOutcome, *, settings: Mapping[str, object], pictures: Mapping[str, str]
) -> None:
    """Write `render_markdown` to `path`; pictures that are not beside it are left out."""
    there = {name: caption for name, caption in pictures.items() if (path.parent / name).is_file()}
    path.write_text(render_markdown(summary, settings=settings, pictures=there), encoding="utf-8")
