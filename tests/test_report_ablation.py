"""tools/report_ablation.py on runs with known numbers, and examples/ablation/run.sh with a stand-in for training."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_longact.reporting import paired_statistics as statistics

ROOT = Path(__file__).resolve().parent.parent


def _load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_ablation", ROOT / "tools/report_ablation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TOOL = _load_tool()


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_t_quantiles_are_those_of_the_printed_tables(df, expected):
    assert statistics.t_quantile(0.975, df) == pytest.approx(expected, rel=1e-5)
    assert statistics.t_cdf(statistics.t_quantile(0.9, df), df) == pytest.approx(0.9, abs=1e-8)


def test_a_mean_and_its_interval():
    mean = statistics.mean_of([1.0, 2.0, 3.0, 6.0])
    assert (mean.n, mean.mean) == (4, 3.0)
    assert mean.std == pytest.approx(math.sqrt(14 / 3))
    assert mean.high - mean.mean == pytest.approx(3.18245 * math.sqrt(14 / 3) / 2, rel=1e-5)
    assert statistics.mean_of([1.0]) == statistics.Mean(1, 1.0, None, None, None)


def test_how_many_seeds_and_prompts_would_tell():
    # ((t + 0.8416) * 1)² for n = 10: 9.63, for n = 9: 9.90
    assert statistics.seeds_needed(5.0, 5.0) == 10
    assert statistics.seeds_needed(-5.0, 5.0) == 10
    assert statistics.seeds_needed(0.5, 5.0) == math.ceil(784.887) + 2
    assert [statistics.seeds_needed(*pair) for pair in ((1.0, None), (0.0, 5.0), (1.0, 0.0), (1e-6, 5.0))] == [None] * 4
    # (1.96 + 0.8416)² * (0.5 * 0.5 + 0.6 * 0.4) / 0.1²
    assert statistics.prompts_needed(10.0, (60.0, 50.0)) == math.ceil(7.848886 * 0.49 / 0.01)
    assert statistics.prompts_needed(0.0, (50.0, 50.0)) is None


def make_run(folder: Path, objective: str, selector: str, seed: int, after: float, *, finished: bool = True) -> None:
    path = folder / objective / selector / f"seed-{seed}"
    path.mkdir(parents=True)
    right = [1.0] * int(after) + [0.0] * (96 - int(after))
    rows = [
        {"iteration": i, "accuracy": a, "prompts": 96, "rewards": right}
        for i, a in ((0, 0.5), (8, after / 100), *((16, 0.9),) * (selector == "high" and not finished))
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"iteration": 4 * i, "reward_mean": i / 9} for i in range(1, 5)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if finished:
        (path / "report.md").write_text("# Report\n")


@pytest.fixture
def folder(tmp_path):
    for seed, base in ((1, 60.0), (2, 70.0), (3, 80.0)):  # seeds differ by far more than selectors
        make_run(tmp_path, "grpo", "high", seed, base + 5)
        make_run(tmp_path, "grpo", "low", seed, base + seed / 10)
        make_run(tmp_path, "grpo", "dense", seed, base + 5 + (seed - 2) * 4)
        make_run(tmp_path, "kl_cov", "high", seed, base)
        make_run(tmp_path, "kl_cov", "low", seed, base - seed)
    make_run(tmp_path, "kl_cov", "dense", 1, 66.0)
    make_run(tmp_path, "kl_cov", "dense", 2, 1.0, finished=False)
    return tmp_path


def test_differences_are_paired_by_seed(folder):
    found = {(each.objective, each.selector): each for each in TOOL.differences(TOOL.find_runs(folder))}
    low = found["grpo", "low"]
    assert low.points.mean == pytest.approx(4.8)
    assert low.points.std == pytest.approx(0.1)
    assert low.told
    dense = found["grpo", "dense"]
    assert dense.points.mean == pytest.approx(0, abs=1e-9)
    assert not dense.told
    assert found["kl_cov", "dense"].points.n == 1
    together = found["all objectives", "low"]
    assert together.points.n == 3
    assert together.points.mean == pytest.approx((4.8 + 2) / 2)
    assert together.prompts_needed is None


def test_the_report_says_what_came_out(folder, capsys):
    assert TOOL.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert (folder / "ablation.md").read_text() == shown[:-1]
    assert "| grpo | 50.0 | 75.0 ± 24.8 (3) | 70.2 ± 25.1 (3) | 75.0 ± 34.8 (3) |" in shown
    assert "| grpo | low | +4.8 | +4.6 to +5.0 | 3 |" in shown
    assert "- grpo: `high` against `low`: better by 4.8 points." in shown
    assert "- grpo: `high` against `dense`: no difference can be told" in shown
    assert "- kl_cov: `high` against `dense`: one seed says nothing (-6.0 points)." in shown
    assert "held-out accuracy" in shown.lower()
    assert "over 96 prompts" in shown
    values = json.loads((folder / "ablation.json").read_text())
    assert values["runs"]["kl_cov"]["dense"].keys() == {"1"}
    assert (folder / "ablation.png").stat().st_size > 5000


def test_runs_are_compared_prompt_by_prompt(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", "high", seed, 60)
        make_run(tmp_path, "grpo", "low", seed, 48)
    [paired] = TOOL.paired_by_prompt(TOOL.find_runs(tmp_path))
    assert (paired.points.n, paired.points.mean, paired.answered_apart) == (192, 12.5, 12.5)
    half = 1.97246 * 100 * math.sqrt(0.125 * 0.875 * 192 / 191) / math.sqrt(192)
    assert paired.points.high - paired.points.mean == pytest.approx(half, rel=1e-4)
    assert "| grpo | low | +12.5 | +7.8 to +17.2 | 192 | 12 % |" in TOOL.report(TOOL.find_runs(tmp_path))


def test_unfinished_runs_are_taken_where_all_of_a_seed_have_been_looked_at(tmp_path):
    for selector in ("high", "low"):
        make_run(tmp_path, "grpo", selector, 1, 60, finished=False)
    with pytest.raises(ValueError, match="no finished run"):
        TOOL.find_runs(tmp_path)
    arms = TOOL.find_runs(tmp_path, unfinished=True)["grpo"]
    assert arms["high"][1].after == arms["low"][1].after == 60
    assert len(arms["high"][1].rewards) == 2  # steps 4 and 8 of 16


def test_no_runs_are_refused_in_one_line(tmp_path, capsys):
    assert TOOL.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


STAND_IN = """
echo "$SEED $DENSE $RANKS $*" >>"$CALLS"
[[ $SEED == 9 ]] && exit 1
mkdir -p "$RUN_DIR" && touch "$RUN_DIR/report.md"
"""


def ablate(tmp_path: Path, *flags: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script with a stand-in for its objectives; what it was called with since the last time."""
    objectives, calls = tmp_path / "objectives", tmp_path / "calls"
    objectives.mkdir(exist_ok=True)
    (objectives / "grpo.sh").write_text(STAND_IN)
    calls.write_text("")
    own = {"OUT": str(tmp_path / "out"), "OBJECTIVE_DIR": str(objectives), "CALLS": str(calls), "OBJECTIVES": "grpo"}
    done = subprocess.run(
        ["bash", "examples/ablation/run.sh", *flags],
        cwd=ROOT,
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done, sorted(calls.read_text().split("\n")[:-1])


def test_the_ablation_calls_each_run_once_and_goes_on(tmp_path):
    selectors = "high high-fixed low random random-fixed weight-norm gradient dense"
    every: dict[str, Any] = {"SEEDS": "1 2", "SELECTORS": selectors}
    done, calls = ablate(tmp_path, "--train-iters", "4", **every)
    assert done.returncode == 0, done.stderr
    flags = "--grpo-iterations 2 --train-iters 32 --rl-prompts-per-eval 128 --train-iters 4"
    chosen = [f"--longact-select {name}" for name in ("high", "low", "random", "weight-norm", "gradient")]
    chosen += [f"--longact-select {name} --longact-refresh-interval 0" for name in ("high", "random")]
    expected = [f"{seed} 0 1 {flags} {one} --longact-seed {seed}" for seed in (1, 2) for one in chosen]
    assert calls == sorted([*expected, f"1 1 1 {flags}", f"2 1 1 {flags}"])
    (tmp_path / "out/grpo/low/seed-2/report.md").unlink()
    _, calls = ablate(tmp_path, "--train-iters", "4", **every)
    assert calls == [f"2 0 1 {flags} --longact-select low --longact-seed 2"]


def test_the_ablation_refuses_what_does_not_fit(tmp_path):
    done, calls = ablate(tmp_path, SELECTORS="highest")
    assert (done.returncode, calls) == (2, [])
    assert "SELECTORS has highest; known: high" in done.stderr
    done, _ = ablate(tmp_path, OBJECTIVES="ppo")
    assert "has no ppo.sh" in done.stderr
    done, _ = ablate(tmp_path, SEEDS="9 1", SELECTORS="dense")
    assert "out/grpo/dense/seed-9 failed: see" in done.stdout
    assert (tmp_path / "out/grpo/dense/seed-1/report.md").exists()
    done, calls = ablate(tmp_path, "--lr", "1", SEEDS="1", SELECTORS="high")
    assert (done.returncode, calls) == (2, [])
    assert "holds runs of other settings" in done.stderr
