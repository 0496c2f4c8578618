"""The page of a run, of several runs side by side, for `longact report`. Pure, but for reading the run's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_longact import metrics
from megatron_longact.reporting.charts import Curve, curve, line_chart
from megatron_longact.reporting.page import Answer, Chart, Page, Part, Picture, Section, Table, Text
from megatron_longact.rl.answer_pages import mean, printable, three_digits
from megatron_longact.rl.report import PICTURES, REPORT, SALIENCY
from megatron_longact.rl.run_files import RunFiles
from megatron_longact.selection import num_selected

_MOST_ANSWERS = 3
"""Right ones, and wrong ones."""
_MOST_CHARACTERS = 1200
_KEYS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "params_dtype"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "world_size"),
    *("lr", "lr_decay_style", "weight_decay", "clip_grad", "optimizer", "train_iters", "global_batch_size"),
    *("micro_batch_size", "seq_length", "grpo_prompts_per_step", "grpo_group_size", "grpo_clamp_eps_lower"),
    *("grpo_clamp_eps_upper", "grpo_kl_beta", "rl_default_temperature", "context_lengths", "heldout_context_lengths"),
    *("max_response_length", "train_data", "heldout_data", "seed", "pretrained_checkpoint", "load", "save"),
)


def page_of_run(run: RunFiles) -> Page:
    """Everything that is known of it."""
    sections = [
        Section("Held-out accuracy", _heldout(run)),
        Section("Reward and time", _training(run)),
        Section("The mask over time", _masks(run)),
        Section("Saliency by layer", _saliency(run)),
        Section("What moved", _moved(run)),
        Section("What the model says", [*_answers(run, heldout=True), *_answers(run, heldout=False)]),
        Section("Configuration", _configuration(run)),
    ]
    *above, name = run.folder.resolve().parts
    name = "/".join([*above[-2:], name]) if name.startswith("seed") else name  # of an ablation: objective, arm, seed
    return Page(f"Run {name}", _lead(run), sections, facts=_facts(run))


def _lead(run: RunFiles) -> list[str]:
    done, wanted = run.steps[-1]["iteration"] if run.steps else 0, run.arguments.get("train_iters")
    if run.verdict:
        return [run.verdict]
    state = f"{REPORT} was cut off" if run.report else "The run has not ended"
    return [f"{state}: iteration {done}{f' of {wanted}' if wanted else ''}."]


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    if not run.steps:
        return []
    last, facts = run.steps[-1], [("iterations", str(run.steps[-1]["iteration"]))]
    if run.evaluations:
        ends = run.evaluations[:1] + run.evaluations[1:][-1:]
        facts.append(("held-out accuracy", " → ".join(f"{row['accuracy']:.1%}" for row in ends)))
    tail = mean(row.get("reward_mean") for row in run.steps[-5:])
    facts.append(("reward, last steps", "NaN" if tail is None else f"{tail:.3f}"))
    share = last.get(metrics.EVER_ACTIVE_FRACTION)
    if last.get(metrics.REFRESHES) is None:
        facts.append(("LongAct", "off: every row trains"))
    elif share is not None:
        facts.append(("rows ever in the mask", f"{share:.1%}"))
    seconds = [row["step_time_s"] for row in run.steps if row.get("step_time_s")]
    return [*facts, ("time of a step", f"{sum(seconds) / len(seconds):.3g} s")] if seconds else facts


def _heldout(run: RunFiles) -> list[Part]:
    rows = run.evaluations
    if not rows:
        return [Text("No held-out accuracy was measured.")]
    first, last = rows[0], rows[-1]
    lengths = sorted({n for row in rows for n in row["accuracy_by_length"]}, key=int)
    asked = [n for n in lengths if any(n in row["accuracy_by_length"] for row in (first, last))]
    lines = [(f"{n} tokens", *_cells(first, last, n)) for n in asked]
    lines.append((f"all {last['prompts']} prompts", *_cells(first, last, None)))
    caption = f"Held-out accuracy, iteration {first['iteration']}"
    caption += f" and iteration {last['iteration']}" if len(rows) > 1 else ""
    if "accuracy_interval" in last:
        caption += "; in brackets 95 % intervals over the prompts (Wilson's)"
    header = ("context length", "before", "after", "points") if len(rows) > 1 else ("context length", "accuracy")
    curves = [_curve_of(length, rows) for length in lengths]
    chart = line_chart("Held-out accuracy", curves, along="iteration", percent=True, span=(0, 1))
    return [Table(caption, header, lines), *_there(chart)]


def _curve_of(length: str, rows: Sequence[dict[str, Any]]) -> Curve:
    """Of the evaluations at that length: a run that goes on can have others."""
    own = [row for row in rows if length in row["accuracy_by_length"]]
    points = [(row["iteration"], row["accuracy_by_length"][length]) for row in own]
    return Curve(f"{length} tokens", points, [_interval(row, length) for row in own])


def _cells(first: dict[str, Any], last: dict[str, Any], length: str | None) -> tuple[str, ...]:
    """Accuracy at a length, or over all, before and after, and the points between them; of one evaluation its own."""
    if first is last:
        return (_share(last, length),)
    return _share(first, length), _share(last, length), _points(first, last, length)


def _accuracy(row: dict[str, Any], length: str | None) -> float | None:
    found: float | None = row["accuracy"] if length is None else row["accuracy_by_length"].get(length)
    return found


def _interval(row: dict[str, Any], length: str | None) -> tuple[float, float] | None:
    found = row.get("accuracy_interval") if length is None else row.get("accuracy_interval_by_length", {}).get(length)
    return (found[0], found[1]) if found else None


def _share(row: dict[str, Any], length: str | None) -> str:
    value, ends = _accuracy(row, length), _interval(row, length)
    if value is None:
        return "–"
    return f"{value:.1%}" + (f" ({100 * ends[0]:.0f}–{100 * ends[1]:.0f})" if ends else "")


def _points(first: dict[str, Any], last: dict[str, Any], length: str | None) -> str:
    """None over all where these are not of the same lengths."""
    before, after = (_accuracy(row, length) for row in (first, last))
    alike = length is not None or first["accuracy_by_length"].keys() == last["accuracy_by_length"].keys()
    return f"{100 * (after - before):+.1f}" if alike and before is not None and after is not None else "–"


def _there(*charts: Chart | None) -> list[Part]:
    return [chart for chart in charts if chart is not None]


def _curves(run: RunFiles, names: dict[str, str]) -> list[Curve]:
    """One for each column of metrics.jsonl; names: what it is called there, and here."""
    places = [row["iteration"] for row in run.steps]
    return [curve(label, places, [row.get(name) for row in run.steps]) for name, label in names.items()]


def _training(run: RunFiles) -> list[Part]:
    def chart(title: str, names: dict[str, str], **look: Any) -> Chart | None:
        return line_chart(title, _curves(run, names), along="iteration", **look)

    return _there(
        chart("Reward of the rollouts", {"reward_mean": "mean reward", "accuracy": "accuracy"}),
        chart("Responses", {"response_length_mean": "mean length, tokens"}),
        chart("Cut off at the limit", {"truncated_fraction": "share of responses"}, percent=True, span=(0, 1)),
        chart("Entropy", {"entropy": "of a token, in nats"}),
        chart(
            "Seconds",
            {"step_time_s": "optimizer step", "rollout_time_s": "rollouts", "log_prob_time_s": "log-probs"},
            span=(0, 0),
        ),
        chart("Seconds of LongAct in a step", {metrics.TIME: "LongAct"}, span=(0, 0)),
        chart("Gradient norm", {"grad_norm": "before clipping"}),
    )


def _masks(run: RunFiles) -> list[Part]:
    if run.steps and run.steps[-1].get(metrics.REFRESHES) is None:
        return [Text("LongAct was off in this run: there is no mask, and every row trains.")]
    names = {metrics.MASK_JACCARD: "with the step before", metrics.MASK_JACCARD_FIRST: "with the first mask"}
    rows = {
        metrics.EVER_ACTIVE_FRACTION: "ever in the mask",
        metrics.ACTIVE_FRACTION_Q: "Q rows in it now",
        metrics.ACTIVE_FRACTION_K: "K rows in it now",
    }
    return _there(
        line_chart("Overlap of the mask (Jaccard)", _curves(run, names), along="iteration", span=(0, 1)),
        line_chart("Rows of Q and K", _curves(run, rows), along="iteration", percent=True, span=(0, 0.5)),
    )


def _saliency(run: RunFiles) -> list[Part]:
    parts: list[Part] = []
    state = run.state("longact")
    if state is not None and state["saliency"] is not None:
        layers, ratio = [number - 1 for number in state["layer_numbers"]], state["config"]["ratio"]
        parts += _there(
            *(_by_layer(name, layers, state["saliency"][part], ratio=ratio) for part, name in (("q", "Q"), ("k", "K")))
        )
        parts.append(Text(f"Of the newest checkpoint, {run.checkpoint[0] if run.checkpoint else ''}; layers from 0."))
    picture = run.folder / SALIENCY
    if picture.is_file():
        parts.append(Picture("Every channel, in the last step", picture.read_bytes(), PICTURES[SALIENCY]))
    return parts or [Text("No checkpoint of this run holds a saliency.")]


def _by_layer(name: str, layers: Sequence[int], saliency: Tensor, *, ratio: float) -> Chart | None:
    ordered = saliency.float().sort(dim=1, descending=True).values
    channels = ordered.shape[1]
    share = f"where the upper {100 * ratio:g} % begin"
    columns = {"largest channel": 0, share: num_selected(ratio, channels) - 1, "median channel": channels // 2}
    curves = [curve(label, layers, ordered[:, column].tolist()) for label, column in columns.items()]
    log = bool((ordered[:, channels // 2] > 0).all())
    return line_chart(f"Saliency of {name} channels", curves, along="layer", log=log)


def _moved(run: RunFiles) -> list[Part]:
    parts: list[Part] = []
    counted = run.table("counted at the end")
    if counted:
        parts.append(Table("Counted at the end, in the masters", ("", "count"), counted))
    parts += _active_by_layer(run)
    since = {
        "bf16/changed_model_since_start": "whole model",
        "bf16/changed_qk_since_start": "W_Q and W_K",
    }
    step = {
        "bf16/changed_qk_active": "in rows of the mask",
        "bf16/changed_qk_frozen": "in the other rows",
        "bf16/changed_model": "whole model",
    }
    parts += _there(
        line_chart("Elements with another bf16 value than at the start", _curves(run, since), along="iteration",
                   percent=True, span=(0, 0)),
        line_chart("Elements that a step changed in bf16", _curves(run, step), along="iteration", percent=True,
                   span=(0, 0)),
    )  # fmt: skip
    return parts or [Text("Nothing is known yet: a run counts what moved at its end, and at each checkpoint.")]


def _active_by_layer(run: RunFiles) -> list[Part]:
    rows, state = (run.state("rl") or {}).get("rows"), run.state("longact")
    if rows is None:
        return []
    count = len(rows["moved"]["q"])
    layers = [n - 1 for n in state["layer_numbers"]] if state else range(count)
    curves = [
        curve(f"{part.upper()} rows that {what}", list(layers), rows[key][part].double().mean(1).tolist())
        for key, what in (("moved", "moved"), ("active", "a mask let through"))
        for part in ("q", "k")
    ]
    return _there(line_chart("By layer, up to the newest checkpoint", curves, along="layer", percent=True, span=(0, 1)))


def _answers(run: RunFiles, *, heldout: bool) -> list[Part]:
    rows = run.answers(heldout=heldout)
    right, wrong = ([row for row in rows if row["correct"] is fine][:_MOST_ANSWERS] for fine in (True, False))
    kind = "Held-out" if heldout else "Training"
    return [
        Answer(
            f"{kind} prompt {row['prompt']}, {printable(row['task'])}: {'right' if row['correct'] else 'wrong'}",
            f"reward {three_digits(row['reward'])}, {row['prompt_tokens']} tokens of prompt, {row['response_tokens']} "
            f"of answer, ended by {'itself' if row['ended'] == 'eod' else 'the limit'}; iteration {row['iteration']}",
            [
                ("the end of the prompt", printable(row["prompt_end"][-_MOST_CHARACTERS:])),
                ("answer", printable(row["response"][:_MOST_CHARACTERS]) or "(nothing)"),
                ("wanted", printable(json.dumps(row["reference"], ensure_ascii=False)[:_MOST_CHARACTERS])),
            ],
        )
        for row in chain(right, wrong)
    ]


def _configuration(run: RunFiles) -> list[Part]:
    settings = run.table("setting") or [(key, run.arguments[key]) for key in _KEYS if key in run.arguments]
    state = run.state("longact")
    if state is not None and not run.table("setting"):
        settings = [("LongAct", json.dumps(state["config"])), *settings]
    parts: list[Part] = [Table("Settings", ("setting", "value"), settings)] if settings else []
    if run.versions:
        parts.append(Table("Made with", ("package", "version"), list(run.versions.items())))
    if run.arguments:
        every = sorted(run.arguments.items())
        parts.append(Table(f"All {len(every)} arguments of the program", ("argument", "value"), every, folded=True))
    return parts


def page_of_runs(folder: Path, runs: Sequence[RunFiles]) -> Page:
    """Several runs, a line each, and their curves in one chart."""
    header = (
        "run",
        "iterations",
        "held-out before",
        "after",
        "points",
        "reward, last steps",
        "mask overlap",
        "s a step",
    )
    names = [str(run.folder.relative_to(folder)) for run in runs]
    lines = [(name, *_line(run)) for name, run in zip(names, runs, strict=True)]
    accuracy = [
        Curve(name, [(row["iteration"], row["accuracy"]) for row in run.evaluations])
        for name, run in zip(names, runs, strict=True)
    ]
    reward = [
        curve(name, [row["iteration"] for row in run.steps], _smooth([row.get("reward_mean") for row in run.steps]))
        for name, run in zip(names, runs, strict=True)
    ]
    charts = _there(
        line_chart("Held-out accuracy", accuracy, along="iteration", percent=True, span=(0, 1)),
        line_chart("Mean reward, over five steps", reward, along="iteration"),
    )
    sections = [
        Section("Side by side", [Table("Runs", header, lines), *charts]),
        Section("One by one", [Text(f"{name}: {' '.join(_lead(run))}") for name, run in zip(names, runs, strict=True)]),
    ]
    lead = [f"{len(runs)} runs; longact report, given the folder of one of them, shows it in full."]
    return Page(f"Runs in {folder.resolve().name}", lead, sections)


def _line(run: RunFiles) -> tuple[str, ...]:
    facts = dict(_facts(run))
    before, after = (run.evaluations[i] if run.evaluations else None for i in (0, -1))
    overlaps = [row[metrics.MASK_JACCARD] for row in run.steps if row.get(metrics.MASK_JACCARD) is not None]
    return (
        facts.get("iterations", "0"),
        *("–" if row is None else _share(row, None) for row in (before, after)),
        "–" if before is None or after is None else _points(before, after, None),
        facts.get("reward, last steps", "–"),
        f"{sum(overlaps) / len(overlaps):.3f}" if overlaps else "–",
        facts.get("time of a step", "–").removesuffix(" s"),
    )


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    return [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
