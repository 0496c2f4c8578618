"""What `longact emulate-fp8` does: the rows that each recipe selects, against those of bf16."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megatron_longact.analysis.activations.hf import HFSource
from megatron_longact.analysis.activations.measurement import measure
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.fp8.emulation import Linears, emulated
from megatron_longact.analysis.fp8.formats import RECIPES
from megatron_longact.analysis.stability.overlap import jaccard
from megatron_longact.config import LongActConfig
from megatron_longact.conversion.plan import table
from megatron_longact.reporting.run_log import Progress
from megatron_longact.selection import QK, select_masks

RESULTS = "fp8.json"
TOTAL = len(RECIPES) + 1  # delayed goes through the prompts twice


def run(
    source: HFSource, options: PromptOptions, *, ratio: float, linears: Linears, output: Path, terminal: TextIO
) -> None:
    """Measure under each recipe, and say which rows are no longer those of bf16; writes `fp8.json`."""
    config = LongActConfig(ratio=ratio)
    prompts = [
        prompt
        for task in options.tasks
        for length in options.lengths
        for prompt in options.prompts(source, task=task, length=length)
    ]
    print(options.framing_for(source).remark, file=terminal)
    progress, done = Progress(TOTAL, terminal), 0
    scores: dict[str, QK] = {}
    for recipe in RECIPES:
        with emulated(source, recipe, linears=linears):
            for _ in range(2 if recipe == "delayed" else 1):  # its first pass fills the history of magnitudes
                scores[recipe] = measure(source, prompts).scores[config.tap, config.statistic]
                done += 1
                progress.update(done, {"": recipe})
    progress.close()
    masks = {name: select_masks(each, layout=source.layout, config=config) for name, each in scores.items()}
    rows = [_against_bf16(recipe, scores, masks) for recipe in RECIPES[1:]]
    settings = {"model": source.name, "tokens": sum(map(len, prompts)), "prompts": len(prompts), "linears": linears}
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text(json.dumps(settings | {"recipes": rows}, indent=2) + "\n")
    print(as_table(rows), file=terminal)
    which = "linear_qkv alone" if linears == "qkv" else "all linear layers"
    print(
        f"an emulation in fp32: {settings['tokens']} tokens, {which} in FP8; {RESULTS} in {output}",
        file=terminal,
        flush=True,
    )


def _against_bf16(recipe: str, scores: dict[str, QK], masks: dict[str, QK]) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": recipe}
    for part in ("q", "k"):
        old, new = getattr(masks["bf16"], part), getattr(masks[recipe], part)
        a, b = getattr(scores["bf16"], part), getattr(scores[recipe], part)
        row[part] = {
            "overlap": jaccard(old, new),
            "by_layer": [jaccard(x, y) for x, y in zip(old, new, strict=True)],
            "rows_changed": int((new & ~old).sum()),
            "rows": int(old.sum()),
            "relative_change": float(((b - a).abs() / a).mean()),
            "same_largest": int((a.argmax(1) == b.argmax(1)).sum()),
        }
    return row


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a recipe."""
    head = ("recipe", *(f"{part} {what}" for part in "QK" for what in ("overlap", "lowest", "layer", "rows", "scores")))
    lines = []
    for row in rows:
        cells: list[str] = [row["recipe"]]
        for part in ("q", "k"):
            own = row[part]
            lowest = min(own["by_layer"])
            cells += [
                f"{own['overlap']:.3f}",
                f"{lowest:.3f}",
                str(own["by_layer"].index(lowest)),
                f"{own['rows_changed']} of {own['rows']}",
                f"{own['relative_change']:.2%}",
            ]
        lines.append(tuple(cells))
    return table(head, lines)
