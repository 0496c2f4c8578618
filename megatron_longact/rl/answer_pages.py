"""What `longact show` prints of a run's answers, line by line. Pure: reads JSON-lines files, needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_longact.flags import Flag, each_once
from megatron_longact.reporting.run_log import EVALUATIONS, HELDOUT, METRICS, ROLLOUTS, rows_of
from megatron_longact.tasks.intervals import wilson

ALL = "all"
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 600, 2000
FEW = 0.1
"""With this share of right answers or less it is said what to look at."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShowFlags:
    """Which answers. Raises `ValueError` for a step that is none."""

    heldout: bool = False
    """The answers to held-out prompts instead of the rollouts."""
    step: Annotated[tuple[str, ...], Flag(metavar="N", parse=each_once)] = ()
    """Rollout steps, with --heldout iterations; or all. Default: the last one there is."""
    prompt: Annotated[tuple[int, ...], Flag(metavar="N", parse=each_once)] = ()
    """Only answers to these prompts, by their number in the step or in the evaluation."""
    wrong: bool = False
    """Only wrong answers."""
    reward_below: float | None = None
    """Only answers with less reward than this."""
    full: bool = False
    """Prompts' ends and answers in full, however long."""

    def __post_init__(self) -> None:
        for step in self.step:
            if step != ALL and not step.isdecimal():
                raise ValueError(f"--step is {step}; give numbers, or all")

    @property
    def file(self) -> str:
        """Where the answers are."""
        return HELDOUT if self.heldout else ROLLOUTS

    def wants(self, row: Row) -> bool:
        """Whether an answer of a wanted step is shown."""
        return (
            (not self.prompt or row["prompt"] in self.prompt)
            and (not self.wrong or not row["correct"])
            and (self.reward_below is None or (row["reward"] is not None and row["reward"] < self.reward_below))
        )


def pages(run: Path, flags: ShowFlags) -> Iterator[str]:
    """What is printed, piece by piece: how each step went, then its answers.

    Raises `ValueError` for a folder without answers, and for a step or prompts that are not there.
    """
    path = run / flags.file
    there = _steps(path, flags)
    wanted = list(there) if ALL in flags.step else [int(step) for step in flags.step] or list(there)[-1:]
    for step in wanted:
        if step not in there:
            raise ValueError(f"{path} has no answers of {_named(flags, step)}; it has those of {_ranges(list(there))}")
    _check_prompts(path, flags, wanted)
    totals = _totals(run, flags)
    summarised: list[Row] = []
    for step in wanted:
        rows = [row for row in rows_of(path) if _step(row, flags) == step]
        summarised += rows
        yield heading(rows, totals.get(step), name=_named(flags, step))
        yield from (answer(row, full=flags.full) for row in rows if flags.wants(row))
    yield "\n".join(why_wrong(summarised) or ["All answers written are right."])


def heading(rows: Sequence[Row], total: Row | None, *, name: str) -> str:
    """How a step went: over all its answers if its line in the metrics says so, else over those written."""
    if total is None:
        count = len(rows)
        right, cut, empty = (sum(map(test, rows)) for test in (_right, _cut, _empty))
        reward, of = mean(row["reward"] for row in rows), f"{count} answers written"
    else:
        count = round(total["count"])
        right, cut, empty = (round(count * total[share]) for share in ("accuracy", "cut", "empty"))
        reward, of = total["reward"], f"{count} answers" + (f" ({len(rows)} written)" if len(rows) < count else "")
    low, high = (100 * end for end in wilson(right / count, count))
    return (
        f"{name}: of {of} {right} right ({right / count:.1%}; 95 %: {low:.0f}-{high:.0f}), {cut} ended by length, "
        f"{empty} empty; mean reward {three_digits(reward)}\n"
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers: a run's files have null for NaN."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def three_digits(value: float | None) -> str:
    """A number out of a run's file, with three digits that count."""
    return "NaN" if value is None else f"{value:.3g}"


def answer(row: Row, *, full: bool) -> str:
    """One answer: the prompt's end, what the model said, and what was wanted."""
    sample = f", answer {row['sample']}" if "sample" in row else f" ({row['length']} tokens)"
    used = "" if row.get("used", True) else "; not trained on"
    ended = "ended by itself" if row["ended"] == "eod" else "ended by length"
    task, source = printable(row["task"]), printable(f", {row['source']}" if row["source"] else "")
    prompt = row["prompt_end"] if full else row["prompt_end"][-PROMPT_CHARACTERS:]
    lines = [
        f"== {task}, prompt {row['prompt']}{sample}{source}: {'right' if row['correct'] else 'WRONG'}, "
        f"reward {three_digits(row['reward'])}; {row['response_tokens']} tokens, {ended}{used}",
        f"-- the end of its {row['prompt_tokens']} tokens",
        printable(prompt).strip("\n"),
        "-- answer",
        _shortened(printable(row["response"]), full=full) or "(empty)",
        "-- wanted",
        wanted(row["reference"]),
    ]
    return "\n".join(lines) + "\n"


def why_wrong(rows: Sequence[Row]) -> list[str]:
    """What the wrong ones of those written are like; where hardly any is right also what to look at."""
    kinds = Counter(_kind(row) for row in rows if not row["correct"])
    few = kinds.total() >= (1 - FEW) * len(rows)
    lines = [f"  {kinds[kind]} {kind}" + f": {advice}" * few for kind, advice in _ADVICE.items() if kinds[kind]]
    return [f"Why wrong? Of {kinds.total()} wrong answers among the {len(rows)} written:", *lines] if kinds else []


_HOLDS, _EMPTY, _CUT, _OTHER = (
    "hold what was wanted all the same",
    "are empty",
    "ended by length",
    "ended by themselves and say something else",
)
_ADVICE = {
    _HOLDS: "the reward does not read answers in the form in which the model gives them",
    _EMPTY: "the model ends at once; look at the prompt's end, the chat template and --stop-token-ids",
    _CUT: "--max-response-length is too short, or the model ends with a token that is not among those that end a "
    "response (--stop-token-ids)",
    _OTHER: "read them; with no reward at all the tasks are too hard to begin with",
}


def _kind(row: Row) -> str:
    references = row["reference"] if isinstance(row["reference"], list) else [row["reference"]]
    texts = [str(each).strip().lower() for each in references if each is not None]
    if texts and all(text and text in row["response"].lower() for text in texts):
        return _HOLDS
    return _EMPTY if _empty(row) else _CUT if _cut(row) else _OTHER


def printable(text: str) -> str:
    """What a terminal can be given: a model can write escape sequences."""
    return "".join(each if each.isprintable() or each in "\n\t" else f"\\x{ord(each):02x}" for each in text)


def wanted(reference: Any) -> str:
    """The right answer, on one line."""
    return printable(reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False))


def _shortened(text: str, *, full: bool) -> str:
    if full or len(text) <= ANSWER_CHARACTERS:
        return text
    begin, end = text[: ANSWER_CHARACTERS * 3 // 4], text[-ANSWER_CHARACTERS // 4 :]
    return f"{begin}\n[... {len(text) - len(begin) - len(end)} characters; --full shows them ...]\n{end}"


def _right(row: Row) -> bool:
    return bool(row["correct"])


def _cut(row: Row) -> bool:
    return bool(row["ended"] == "length")


def _empty(row: Row) -> bool:
    return not row["response"].strip()


def _step(row: Row, flags: ShowFlags) -> int:
    return int(row["iteration" if flags.heldout else "step"])


def _named(flags: ShowFlags, step: int) -> str:
    return f"held-out at iteration {step}" if flags.heldout else f"rollout step {step}"


def _steps(path: Path, flags: ShowFlags) -> dict[int, None]:
    """Those that there are answers of, in order."""
    if not path.is_file():
        other = path.parent / (ROLLOUTS if flags.heldout else HELDOUT)
        beside = f"; {other.name} is there: {'without' if flags.heldout else 'with'} --heldout" * other.is_file()
        raise ValueError(
            f"{path} is not there: give the --run-dir of an RL run (`longact train`) that was made with "
            f"{'--log-heldout' if flags.heldout else '--log-rollouts'} above 0{beside}"
        )
    there = dict.fromkeys(_step(row, flags) for row in rows_of(path))
    if not there:
        raise ValueError(f"{path} has no answers yet, or none at all: --log-rollouts and --log-heldout say how many")
    return there


def _check_prompts(path: Path, flags: ShowFlags, steps: Sequence[int]) -> None:
    if flags.prompt:
        there = {row["prompt"] for row in rows_of(path) if _step(row, flags) in steps}
        if not there & {*flags.prompt}:
            asked = _ranges(flags.prompt)
            where = f"{_named(flags, steps[0])}" if len(steps) == 1 else "these steps"
            raise ValueError(f"{path} has no answers to prompt {asked} of {where}; it has those to {_ranges(there)}")


def _totals(run: Path, flags: ShowFlags) -> dict[int, Row]:
    """By step, how many answers there were and how they were, out of the run's own figures."""
    path = run / (EVALUATIONS if flags.heldout else METRICS)
    if not path.is_file():
        return {}
    names = ("prompts", "reward") if flags.heldout else ("responses", "reward_mean")
    step = "iteration" if flags.heldout else "rollout_step"
    return {
        row[step]: {
            "count": row[names[0]],
            "reward": row[names[1]],
            "accuracy": row["accuracy"],
            "cut": row["truncated_fraction"],
            "empty": row["empty_fraction"],
        }
        for row in rows_of(path)
        if names[0] in row and "empty_fraction" in row  # else out of a run from before these were counted
    }


def _ranges(steps: Iterable[int]) -> str:
    """As 0-3, 5: what follows by the smallest distance that there is stands together."""
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
