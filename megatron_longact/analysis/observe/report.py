"""What `longact observe` does: measure a model by context length, say what stands out, draw it, write it down."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_longact.analysis.activations.models import Session
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.observe.observation import Length, Observation, observe
from megatron_longact.analysis.observe.outliers import RopeFrequencies, spread_table, verdict
from megatron_longact.analysis.pages import section
from megatron_longact.config import Statistic
from megatron_longact.reduction import STATISTICS
from megatron_longact.reporting.page import Page
from megatron_longact.reporting.page import write as write_page

RESULTS = "observation.json"


PICTURES = {
    "overview.png": "Every channel's statistic over the layer's median, by layer.",
    "heatmap-projection.png": "Every channel of every layer, at the output of linear_qkv.",
    "heatmap-norm.png": "Every channel of every layer, after q/k-layernorm.",
    "rope.png": "The largest channel by layer and RoPE wavelength.",
}


def run(
    session: Session,
    options: PromptOptions,
    *,
    statistic: Statistic,
    ratio: float,
    output: Path,
    html: Path | None = None,
) -> None:
    """Observe each model of the session; several get a folder of their own each in `output`, and share one page."""
    sections = []
    for number, source in enumerate(session.sources):
        framing = options.framing_for(source)
        session.say(framing.remark)
        observation = observe(source, options, session, statistic=statistic, ratio=ratio)
        if session.first:
            folder = output if number == 0 else output / source.name.replace(" ", "-").replace("/", "-")
            write(observation, options.framed(framing), folder)
            print(report(observation), f"pictures and {RESULTS} are in {folder}", sep="\n\n", file=session.terminal)
            words, tables = "\n".join(verdicts(observation)), dict([_table(observation)])
            sections.append(section(observation.name, folder, words=words, tables=tables, pictures=PICTURES))
    if html is not None and sections:
        write_page(Page("Outliers in queries and keys?", [], sections), html)


def report(observation: Observation) -> str:
    """Table and verdict."""
    return "\n\n".join([*_table(observation), "\n".join(verdicts(observation))])


def _table(observation: Observation) -> tuple[str, str]:
    """Title and table."""
    rows = observation.spreads(observation.longest, "projection")
    norm = observation.spreads(observation.longest, "norm") if "norm" in observation.longest.taps else []
    after = {(row.layer, row.part): row for row in norm}
    shown = spread_table(rows, ratio=observation.ratio, after_norm=after)
    lengths = _name(list(observation.by_length)[-1])
    title = (
        f"{observation.statistic} of the projections' outputs at {lengths}, {observation.longest.tokens} tokens in all"
    )
    return title, shown


def verdicts(observation: Observation) -> list[str]:
    """What one should know, a sentence each."""
    rows = observation.spreads(observation.longest, "projection")
    lines = [verdict(observation.name, rows, ratio=observation.ratio)]
    if "norm" in observation.longest.taps:
        largest = observation.spreads(observation.longest, "norm")[0]
        lines.append(
            f"after q/k-layernorm the largest is {largest.outlier_ratio:.1f} times the median, in layer "
            f"{largest.layer} {largest.part.upper()}"
        )
    if len(observation.by_length) > 1:
        ratios = [observation.spreads(each, "projection")[0].outlier_ratio for each in observation.by_length.values()]
        at = ", ".join(f"{r:.1f} at {_name(length)}" for length, r in zip(observation.by_length, ratios, strict=True))
        lines.append(f"by context length the largest ratio is {at}")
    if observation.rope is not None:
        lines.append(_where(observation))
    return lines


def _where(observation: Observation) -> str:
    """In which half of the RoPE frequencies the largest channels are."""
    rope = observation.rope
    assert rope is not None
    middle = sorted(rope.wavelengths)[len(rope.wavelengths) // 2]
    rows = observation.spreads(observation.longest, "projection")
    slow = sum(row.wavelength is not None and row.wavelength >= middle for row in rows)
    return (
        f"the largest channel turns slowly (RoPE wavelength {middle:.3g} tokens or more, the slower half of the "
        f"frequencies) in {slow} of {len(rows)} Q and K projections"
    )


def _name(length: Length) -> str:
    return "the prompts' own length" if length is None else f"{length} tokens"


def as_json(observation: Observation, options: PromptOptions) -> dict[str, Any]:
    """Everything in numbers."""
    lengths = {
        str(length or "any"): {
            "tokens": measured.tokens,
            "taps": {
                tap: {stat: [asdict(row) for row in observation.spreads(measured, tap, stat)] for stat in STATISTICS}
                for tap in measured.taps
            },
        }
        for length, measured in observation.by_length.items()
    }
    return {
        "model": observation.name,
        "verdict": verdicts(observation),
        "statistic": observation.statistic,
        "ratio": observation.ratio,
        "layout": observation.layout.saved(),
        "layers_counted_from": 0,
        "prompts": {
            "tasks": options.tasks,
            "num_samples": options.num_samples,
            "seed": options.seed,
            "model_template": options.model_template,
        },
        "lengths": lengths,
        "rope": None if observation.rope is None else _rope_json(observation, observation.rope),
    }


def _rope_json(observation: Observation, rope: RopeFrequencies) -> dict[str, Any]:
    profiles = {
        tap: {
            layer: {part: values.tolist() for part, values in parts.items()}
            for layer, parts in observation.rope_profiles(tap).items()
        }
        for tap in observation.longest.taps
    }
    return {"wavelengths_tokens": rope.wavelengths, "largest_over_median": profiles}


def write(observation: Observation, options: PromptOptions, folder: Path) -> None:
    """Pictures and JSON into a folder."""
    from megatron_longact.analysis.observe import plots as observe_plots

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text(json.dumps(as_json(observation, options), indent=1) + "\n")
    observe_plots.write(observation, folder)
