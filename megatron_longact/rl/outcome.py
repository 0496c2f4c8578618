"""The end of a run: table, report.md and pictures, from what the run left in its folder."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_longact import metrics
from megatron_longact.config import LongActConfig
from megatron_longact.longact import LongAct
from megatron_longact.reduction import STATISTICS
from megatron_longact.reporting.run_log import METRICS
from megatron_longact.rl.audit import RowCounts
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.report import (
    MASKS,
    PICTURES,
    REPORT,
    REWARD,
    SALIENCY,
    HeldOutAccuracy,
    RunOutcome,
    render_table,
    write_report,
)


def write_outcome(
    args: Namespace,
    config: RLConfig,
    *,
    evaluations: Sequence[Mapping[str, Any]],
    rows: RowCounts,
    longact: LongAct | None,
) -> str:
    """Write report.md and the pictures into the run's folder; returns the table. On one rank only."""
    run_dir = Path(args.run_dir)
    steps = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    before, after = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    summary = RunOutcome(
        before=None if before is None else HeldOutAccuracy.from_row(before),
        after=None if after is None else HeldOutAccuracy.from_row(after),
        iterations=steps[-1]["iteration"] if steps else 0,
        rows=rows.rows,
        moved=rows.moved,
        frozen=rows.never_active,
        frozen_changed=rows.frozen_changed,
        since=rows.since,
        longact_time_share=None if longact is None else _time_share(steps),
        pass_at=_pass_at(before or {}, after or {}),
        expected_gain=config.expected_gain,
    )
    table = render_table(summary)
    if find_spec("matplotlib") is None:
        table += "\nno pictures: matplotlib is missing (pip install 'megatron-longact[plots]')"
    else:
        _draw(run_dir, steps, evaluations, longact)
    write_report(run_dir / REPORT, summary, settings=_settings(args, config, longact), pictures=PICTURES)
    return table


def _pass_at(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    old = before.get("pass_at_k", {})
    return {k: (old[k], new) for k, new in after.get("pass_at_k", {}).items() if k in old}


def _time_share(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(row[metrics.TIME] for row in steps) / sum(row["step_time_s"] for row in steps)


def _draw(
    run_dir: Path,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    longact: LongAct | None,
) -> None:
    from megatron_longact.reporting.figures import DPI, plot_reward, plot_saliency
    from megatron_longact.reporting.mask_figure import mask_figure

    plot_reward(steps, evaluations, path=run_dir / REWARD)
    if longact is not None:
        names = (metrics.MASK_JACCARD, metrics.MASK_JACCARD_FIRST, metrics.EVER_ACTIVE_FRACTION)
        before, first, ever = ([row.get(name) for row in steps] for name in names)
        places = [row["iteration"] for row in steps]
        figure = mask_figure(places, before=before, first=first, ever=ever, along="iteration")
        figure.savefig(run_dir / MASKS, dpi=DPI)
    if longact is not None and longact.saliency and longact.masks:
        layout = longact.model.layout
        saliency, masks = (
            {layer: layout.by_section(**of) for layer, of in each.items()} for each in (longact.saliency, longact.masks)
        )
        plot_saliency(
            saliency,
            masks,
            heads={section.name: section.heads for section in layout.sections},
            path=run_dir / SALIENCY,
            statistic=_what_is_shown(longact.config),
        )


def _what_is_shown(config: LongActConfig) -> str:
    """The label of the saliency's colour scale."""
    if not config.reads_activations:
        return {
            "random": "random score",
            "weight-norm": "norm of the row",
            "gradient": "root mean square of the row's gradient",
        }[config.select]
    return STATISTICS[config.statistic].label


def _settings(args: Namespace, config: RLConfig, longact: LongAct | None) -> dict[str, object]:
    parallel = f"TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}"
    parallel += f", CP {args.context_parallel_size}" if args.context_parallel_size > 1 else ""
    settings: dict[str, object] = {
        "LongAct": "off" if longact is None else longact.config,
        "parallel layout": f"{parallel}, DP {args.data_parallel_size}",
        "model": f"{args.num_layers} layers, hidden {args.hidden_size}, {args.params_dtype}",
        "learning rate": args.lr,
        "responses a rollout step": f"{config.prompts_per_step} prompts x {config.group_size}",
        "responses an optimizer step": config.global_batch_size,
        "times through a rollout batch": config.epochs,
        "response tokens at most": config.max_response_length,
        "context lengths": config.context_lengths,
        "sampling": config.sampling,
        "policy loss": f"{config.policy_loss}, {config.loss}",
        "KL penalty": f"{config.kl_beta} ({config.kl_estimator})",
        "seed": config.seed,
    }
    if args.rl_defaults:
        settings["defaults of this program, of the flags that were not given"] = " ".join(args.rl_defaults)
    return {name: str(value).replace("|", "\\|") for name, value in settings.items()}
