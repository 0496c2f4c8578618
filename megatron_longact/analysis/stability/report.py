"""What `longact stability` does: choose rows in many ways, compare the choices, and say whether one would do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, TextIO

from megatron_longact.analysis.activations.measurement import Measurement, ModelSource, measure, pooled
from megatron_longact.analysis.activations.models import Session
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.pages import section
from megatron_longact.analysis.stability.masks import read_choices
from megatron_longact.analysis.stability.movement import SHORTEST, Movement, movement, with_hysteresis
from megatron_longact.analysis.stability.movement import report as movement_report
from megatron_longact.analysis.stability.overlap import Choice, Overlap, overlap, verdict
from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import LongActConfig
from megatron_longact.conversion.plan import table
from megatron_longact.reporting.page import Page
from megatron_longact.reporting.page import write as write_page
from megatron_longact.reporting.run_log import Progress
from megatron_longact.selection import select_masks
from megatron_longact.tasks.prompt_flags import Framing

RESULTS = "stability.json"
DEFINITIONS = "statistics and taps"
"""The axis that does not change while a model is trained, so the verdict leaves it out."""
RUNS = "runs' own masks"
PICTURES = {
    "matrices.png": "Overlap of the selected rows, each choice against each other, a panel an axis.",
    "curves.png": "Overlap by layer, and along axes with an order.",
    "masks.png": "Overlap of each mask with the one before and with the first, and the rows that were ever in one.",
}


@dataclass
class Survey:
    """Measurements of the models of a command, and how rows are chosen from them."""

    config: LongActConfig
    layout: AttentionLayout | None = None
    layer_numbers: tuple[int, ...] = ()
    tasks: dict[str, Measurement] = field(default_factory=dict)
    lengths: dict[str, Measurement] = field(default_factory=dict)
    seeds: dict[str, Measurement] = field(default_factory=dict)
    checkpoints: dict[str, Measurement] = field(default_factory=dict)
    framing: Framing | None = None

    def overlaps(self) -> list[Overlap]:
        """Of every axis with two choices or more."""
        axes = {
            "tasks": self.tasks,
            "context lengths": self.lengths,
            "seeds": self.seeds,
            "checkpoints": self.checkpoints,
        }
        found = {axis: [self._choose(name, each) for name, each in of.items()] for axis, of in axes.items()}
        if self.lengths:
            found[DEFINITIONS] = self._definitions(list(self.lengths.values())[-1])
        return [overlap(axis, of, self.layer_numbers) for axis, of in found.items() if len(of) > 1]

    def movements(self, margins: Sequence[float]) -> list[Movement]:
        """What hysteresis makes of prompts that follow each other, and of checkpoints."""
        assert self.layout is not None
        found: list[Movement] = []
        for axis, measured in {"seeds": self.seeds, "checkpoints": self.checkpoints}.items():
            if len(measured) >= SHORTEST:
                choices = [self._choose(name, each) for name, each in measured.items()]
                layout, config = self.layout, self.config
                found += with_hysteresis(axis, choices, layout=layout, config=config, margins=margins)
        return found

    def own(self) -> list[Choice]:
        """What each model chooses at the longest length."""
        return [self._choose(name, each) for name, each in self.checkpoints.items()]

    def _choose(self, name: str, measured: Measurement, config: LongActConfig | None = None) -> Choice:
        config = config or self.config
        if (config.tap, config.statistic) not in measured.scores:
            raise ValueError(f"--tap {config.tap}: this model has no q/k-layernorm; --tap projection would work")
        scores = measured.scores[config.tap, config.statistic]
        assert self.layout is not None
        return Choice(name, select_masks(scores, layout=self.layout, config=config), scores)

    def _definitions(self, measured: Measurement) -> list[Choice]:
        settings = {**asdict(self.config), "import_mask": ""}
        return [
            self._choose(
                f"{statistic}, {tap}", measured, LongActConfig(**{**settings, "tap": tap, "statistic": statistic})
            )
            for tap, statistic in measured.scores
        ]


def run(
    models: AbstractContextManager[Session] | None,
    options: PromptOptions,
    config: LongActConfig,
    *,
    masks: list[Path],
    num_seeds: int,
    mixed: bool,
    margins: Sequence[float],
    output: Path,
    html: Path | None,
    terminal: TextIO,
) -> None:
    """Survey the models, if any, and the masks, if any; write and say what came out.

    Raises `ValueError` if there is nothing to compare.
    """
    if num_seeds < 1:
        raise ValueError(f"--num-seeds is {num_seeds}; it must be at least 1")
    if models is None:
        finish(*_of_runs(masks, []), options, config, output=output, html=html, terminal=terminal)
        return
    with models as session:
        survey = measured(session, options, config, num_seeds=num_seeds, mixed=mixed)
        options = options if survey.framing is None else options.framed(survey.framing)
        overlaps, moved = survey.overlaps(), survey.movements(margins)
        if session.first:
            of_runs, moved_in_runs = _of_runs(masks, survey.own())
            overlaps, moved = overlaps + of_runs, moved_in_runs + moved
            finish(overlaps, moved, options, config, output=output, html=html, terminal=session.terminal)


def _of_runs(masks: list[Path], own: list[Choice]) -> tuple[list[Overlap], list[Movement]]:
    """The masks of runs against each other, and as they follow each other in each run.

    own: what is taken to stand beside a single one.
    """
    if not masks:
        return [], []
    choices, layers = read_choices(masks)
    if len(choices) == 1 and not own:
        raise ValueError(f"--masks holds one mask, {choices[0].name}: give another one, or a model, to compare it with")
    runs: dict[str, list[Choice]] = {}
    for choice in choices:
        runs.setdefault(choice.run, []).append(choice)
    moved = [movement(f"masks of {run}", of) for run, of in runs.items() if run and len(of) >= SHORTEST]
    return [overlap(RUNS, choices if len(choices) > 1 else [*own[:1], *choices], layers)], moved


def measured(
    session: Session, options: PromptOptions, config: LongActConfig, *, num_seeds: int, mixed: bool = False
) -> Survey:
    """The first model on every task, length and seed, the others at the longest length.

    mixed: a seed draws the task of each prompt. Lengths, seeds and checkpoints are compared over all tasks together;
    all but lengths at the longest one.
    """
    survey = Survey(config)
    for source in session.sources:
        prober = _Prober(source, options, session)
        seeds = [options.seed + i for i in range(num_seeds)]
        if not survey.checkpoints:
            survey.framing = options.framing_for(source)
            session.say(survey.framing.remark)
            if num_seeds > 1 and prober.draws_all_alike(seeds):
                session.say(f"each seed draws the same prompts of {options.file}: seeds are not compared")
                seeds = seeds[:1]
            survey.layout, survey.layer_numbers = source.layout, source.layer_numbers
            cells = {length: prober.tasks(length, options.seed) for length in options.lengths}
            survey.tasks = cells[options.lengths[-1]]
            survey.lengths = {_name(length): pooled(list(of.values())) for length, of in cells.items()}
            whole = survey.lengths[_name(options.lengths[-1])]
            sets = {s: prober.mixed(options.lengths[-1], s) for s in seeds} if mixed else {seeds[0]: whole}
            others = [s for s in seeds if s not in sets]
            sets |= {s: pooled(list(prober.tasks(options.lengths[-1], s).values())) for s in others}
            survey.seeds = {f"seed {s}": sets[s] for s in seeds}
        else:
            whole = pooled(list(prober.tasks(options.lengths[-1], options.seed).values()))
        survey.checkpoints[_unused(source.name, survey.checkpoints)] = whole
    return survey


def drawn(tasks: Sequence[str], num_samples: int, *, seed: int) -> dict[str, int]:
    """How often each task comes when each of `num_samples` prompts for every task has one that is drawn."""
    names = Random(seed).choices(tasks, k=num_samples * len(tasks))
    return {task: names.count(task) for task in tasks if task in names}


@dataclass(frozen=True)
class _Prober:
    source: ModelSource
    options: PromptOptions
    session: Session

    def mixed(self, length: int | None, seed: int) -> Measurement:
        """As many prompts as of all tasks together, the task of each drawn."""
        counts = drawn(self.options.tasks, self.options.num_samples, seed=seed)
        asked = [replace(self.options, tasks=(task,), num_samples=count) for task, count in counts.items()]
        of = [_Prober(self.source, options, self.session) for options in asked]
        return pooled([each for prober in of for each in prober.tasks(length, seed).values()])

    def draws_all_alike(self, seeds: Sequence[int]) -> bool:
        """Whether each seed draws the same prompts, as where a file has no others."""
        if self.options.file is None:
            return False
        [task], length = self.options.tasks, self.options.lengths[-1]
        drawn = [sorted(self.options.prompts(self.source, task=task, length=length, seed=seed)) for seed in seeds]
        return all(each == drawn[0] for each in drawn)

    def tasks(self, length: int | None, seed: int) -> dict[str, Measurement]:
        """Each task's measurement."""
        found = {}
        progress = Progress(len(self.options.tasks), self.session.terminal)
        for task in self.options.tasks:
            prompts = self.options.prompts(self.source, task=task, length=length, seed=seed)
            found[task] = measure(self.source, prompts)
            if self.session.first:
                progress.update(len(found), {"": f"{self.source.name}, {task} at {_name(length)}, seed {seed}"})
        if self.session.first:
            progress.close()
        return found


def _name(length: int | None) -> str:
    return "own length" if length is None else f"{length} tokens"


def _unused(name: str, used: dict[str, Measurement]) -> str:
    return name if name not in used else f"{name} ({len(used) + 1})"


def finish(
    overlaps: list[Overlap],
    moved: list[Movement],
    options: PromptOptions,
    config: LongActConfig,
    *,
    output: Path,
    html: Path | None,
    terminal: TextIO,
) -> None:
    """Write and print everything."""
    if not overlaps:
        raise ValueError("there is nothing to compare: give several tasks, lengths, seeds, checkpoints or masks")
    words = conclusion(overlaps)
    output.mkdir(parents=True, exist_ok=True)
    results = as_json(overlaps, options, config, words) | {"movement": [each.as_json() for each in moved]}
    (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    from megatron_longact.analysis.stability import plots as stability_plots

    stability_plots.write(overlaps, moved, output)
    tables = [report(overlaps), *([movement_report(moved)] if moved else [])]
    print(*tables, words, f"pictures and {RESULTS} are in {output}", sep="\n\n", file=terminal)
    if html is not None:
        captions = dict(zip(("Overlap of the selected rows", "Masks one after another"), tables, strict=False))
        shown = section("Choices against each other", output, words=words, tables=captions, pictures=PICTURES)
        write_page(Page("Would a mask chosen once do?", [], [shown]), html)


def conclusion(overlaps: Sequence[Overlap]) -> str:
    """The verdict over what changes while a model is trained."""
    changing = [each for each in overlaps if each.axis != DEFINITIONS]
    if not changing:
        return "no verdict: only statistics and taps were compared; give several tasks, lengths, seeds or checkpoints"
    return verdict(changing)


def report(overlaps: Sequence[Overlap]) -> str:
    """A line for each axis."""
    header = ("Jaccard overlap by", "choices", "mean", "lowest", "chance", "least carried", "lowest between")
    lines = [
        (
            each.axis,
            str(len(each.names)),
            f"{each.mean:.3f}",
            f"{each.worst[0]:.3f}",
            f"{each.mean_chance:.3f}",
            "-" if each.least_carried is None else f"{each.least_carried:.1%}",
            each.worst[1],
        )
        for each in overlaps
    ]
    return table(header, lines)


def as_json(overlaps: Sequence[Overlap], options: PromptOptions, config: LongActConfig, words: str) -> dict[str, Any]:
    """Everything in numbers."""
    chosen = {name: getattr(config, name) for name in ("ratio", "scope", "statistic", "tap")}
    prompts = {"tasks": options.tasks, "lengths": options.lengths, "num_samples": options.num_samples}
    return {
        "verdict": words,
        "selection": chosen,
        "prompts": {**prompts, "seed": options.seed, "model_template": options.model_template},
        "axes": {each.axis: each.as_json() for each in overlaps},
    }
