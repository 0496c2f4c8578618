"""What came out of `longact disrupt`: a table, JSON, and responses side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longact.analysis.disrupt.tasks import NGRAM, Row, summary
from megatron_longact.analysis.pages import section
from megatron_longact.reporting.page import Answer, Page, Section
from megatron_longact.reporting.page import write as write_page
from megatron_longact.tasks.benchmark import other_lengths
from megatron_longact.tasks.intervals import NOTE, with_interval

RESULTS, RESPONSES, SAMPLES, PICTURE = "results.json", "responses.jsonl", "samples.md", "disruption.png"
_END_OF_PROMPT = 240
_HEADS = ("all", f"distinct-{NGRAM}", "longest loop", "in loops", "unfinished", "perplexity")


@dataclass(frozen=True)
class Run:
    """The responses with some channels replaced; channels and replacement are "" for the undisturbed model."""

    channels: str
    replacement: str
    rows: list[Row]
    perplexity: float | None
    ratio: float | None = None
    """Share of the channels; None where there is one share only."""

    @property
    def name(self) -> str:
        """Such as `high channels by their mean`, or `high 3% by their mean` where there are several shares."""
        if not self.channels:
            return "undisturbed"
        which = "channels" if self.ratio is None else f"{100 * self.ratio:g}%"
        return f"{self.channels} {which} by {'their mean' if self.replacement == 'mean' else self.replacement}"

    def results(self) -> dict[str, Any]:
        """The run's part of results.json."""
        what: dict[str, Any] = {
            "name": self.name,
            "channels": self.channels or None,
            "replacement": self.replacement or None,
        }
        what |= {} if self.ratio is None else {"ratio": self.ratio}
        return what | summary(self.rows) | {"perplexity": self.perplexity}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line a run: accuracy in percent by length, repetition, perplexity."""
    lengths = list(runs[0]["accuracy_by_length"])
    lines = [["replaced", *(f"{n} tokens" for n in lengths), *_HEADS]]
    for run in runs:
        shares = [(run["accuracy_by_length"][n], run["accuracy_interval_by_length"][n]) for n in lengths]
        shares.append((run["accuracy"], run["accuracy_interval"]))
        distinct = run[f"distinct_{NGRAM}"]
        lines.append(
            [
                run["name"],
                *(with_interval(f"{share:.1f}", interval) for share, interval in shares),
                "-" if distinct is None else f"{distinct:.3f}",
                f"{run['longest_loop']:.1f}",
                f"{run['loop_share']:.1f}",
                f"{run['unfinished']:.1f}",
                "-" if run["perplexity"] is None else f"{run['perplexity']:.4g}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def legend(results: Mapping[str, Any]) -> str:
    """What the columns of the table mean, and what the channels were measured on."""
    counts = set(results["runs"][0]["samples_by_length"].values())
    numbers = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    changed = other_lengths(results["settings"]["tokens_to_generate"], results["official_tokens"])
    lines = (
        *changed,
        f"accuracy in percent over {numbers} prompts of each length",
        NOTE,
        f"distinct-{NGRAM}: different over all {NGRAM}-grams of a response; longest loop: tokens of it that are a",
        "block repeated back to back; in loops: that as percent of the response; unfinished: percent that did not end",
        f"by themselves. Channels measured on {results['measured']['prompts']} other prompts, "
        f"{results['measured']['tokens']} tokens",
    )
    return "\n".join(lines)


def write(results: Mapping[str, Any], runs: Sequence[Run], *, output: Path, show: int) -> None:
    """Write results.json, responses.jsonl and samples.md."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    lines = [json.dumps({"run": run.name} | row, ensure_ascii=False) for run in runs for row in run.rows]
    (output / RESPONSES).write_text("\n".join(lines) + "\n", "utf-8")
    (output / SAMPLES).write_text(side_by_side(runs, show=show), "utf-8")


def write_html(results: Mapping[str, Any], runs: Sequence[Run], *, folder: Path, path: Path, show: int) -> None:
    """Table, picture and responses on one page."""
    shown = section(
        "What was replaced, and what the model then did",
        folder,
        words="",
        tables={"Accuracy and repetition": table(results["runs"])},
        pictures={PICTURE: "Accuracy by context length, repetition and perplexity, undisturbed and disturbed."},
        legend=legend(results),
    )
    answers = [_answer(runs, key) for key in _shown(runs[0].rows, show)]
    page = Page("What is lost without some channels?", [], [shown, Section("Responses side by side", answers)])
    write_page(page, path)


def _answer(runs: Sequence[Run], key: tuple[int, int, str]) -> Answer:
    own = [(run.name, next(row for row in run.rows if _key(row) == key)) for run in runs]
    length, index, task = key
    wanted = f"wanted: {', '.join(map(str, own[0][1]['outputs']))}"
    end = ("the end of the prompt", own[0][1]["input"][-_END_OF_PROMPT:])
    said = [(f"{name}, score {row['score']:.0f}", row["pred"]) for name, row in own]
    return Answer(f"{task}, {length} tokens, prompt {index}", wanted, [end, *said])


def side_by_side(runs: Sequence[Run], *, show: int) -> str:
    """For the first `show` prompts of each length: the end of the prompt, what is wanted, and every run's response."""
    parts = ["# Responses side by side\n"]
    for key in _shown(runs[0].rows, show):
        row = next(row for row in runs[0].rows if _key(row) == key)
        length, index, task = key
        parts.append(f"## {task}, {length} tokens, prompt {index}\n")
        parts.append(f"… {_one_line(row['input'])[-_END_OF_PROMPT:]}\n")
        parts.append(f"Wanted: {', '.join(map(str, row['outputs']))}\n")
        parts.append("| replaced | response | score |\n|---|---|---|")
        for run in runs:
            own = next(row for row in run.rows if _key(row) == key)
            text = _one_line(own["pred"]).replace("|", "\\|").replace("`", "'")
            parts.append(f"| {run.name} | `{text or ' '}` | {own['score']:.0f} |")
        parts.append("")
    return "\n".join(parts)


def _shown(rows: Sequence[Row], show: int) -> list[tuple[int, int, str]]:
    keys = sorted(map(_key, rows))
    lengths = sorted({key[0] for key in keys})
    return [key for length in lengths for key in [k for k in keys if k[0] == length][:show]]


def _key(row: Row) -> tuple[int, int, str]:
    return row["max_seq_length"], row["index"], row["task"]


def _one_line(text: str) -> str:
    return " ".join(text.split())
