"""The GPU tier: the RL program of the demo as a user starts it, with Transformer Engine layers, in bf16 and FP8."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import launch
from tests.gpu.models import GPU_TIER, skip_without_chip
from tests.launch import ROOT, demo_model_args, on_ranks

pytestmark = GPU_TIER

FLAGS = [
    *("--transformer-impl", "transformer_engine", "--bf16"),
    *("--context-lengths", "80", "128", "--seq-length", "144", "--max-response-length", "16"),
    *("--rl-prompts-per-eval", "4", "--inference-max-requests", "16"),
    *("--grpo-prompts-per-step", "4", "--grpo-group-size", "4", "--grpo-iterations", "1"),
    *("--grpo-clamp-eps-lower", "0.2", "--grpo-clamp-eps-upper", "0.28"),
    *("--global-batch-size", "16", "--micro-batch-size", "4", "--train-iters", "2"),
    *("--lr", "1e-4", "--lr-decay-style", "constant", "--weight-decay", "0.1", "--log-interval", "1"),
    *("--save-interval", "1000", "--ckpt-format", "torch_dist"),
    *("--use-distributed-optimizer", "--no-gradient-accumulation-fusion", "--longact"),
]

PRECISIONS: dict[str, list[str]] = {
    "bf16": [],
    "tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"],
    "tensorwise, FP8 weights": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-param-gather"],
    "blockwise": ["--fp8-format", "hybrid", "--fp8-recipe", "blockwise"],
}


def train(run_dir: Path, *flags: str) -> list[dict[str, Any]]:
    """Run the program on one GPU; the rows of its metrics.jsonl."""
    program = on_ranks(1, "-m", "megatron_longact.run", "examples/train_grpo.py", *demo_model_args(), *FLAGS)
    checkpoints = ["--save", str(run_dir / "checkpoints"), "--load", str(run_dir / "checkpoints")]
    environment = launch.QUIET | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = launch.run([*program, *checkpoints, "--run-dir", str(run_dir), *flags], timeout=280, environment=environment)
    said = [*re.findall(r"^megatron_longact: .*$", done.stderr, re.M), *re.findall(r"^.*Error: .*$", done.stderr, re.M)]
    assert done.returncode == 0, (
        f"{said[-1] if said else 'it says nothing'}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_rl_program_trains_and_resumes(name: str, tmp_path: Path, record_property: Any) -> None:
    skip_without_chip(None if name == "bf16" else name.split(",")[0])
    # made by local layers, it lacks Transformer Engine's extra states: tests/te/test_modules.py
    start = [
        "--pretrained-checkpoint",
        str(ROOT / "examples/demo/start_checkpoint"),
        "--dist-ckpt-strictness",
        "log_all",
    ]
    rows = train(tmp_path, *PRECISIONS[name], *start)
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["longact/active_fraction_q"] == pytest.approx(0.3, abs=0.01)
        assert row["grad_norm"] > 0
    rows = train(tmp_path, *PRECISIONS[name], "--train-iters", "3", "--override-opt_param-scheduler")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    record_property(
        "log-prob difference rollout to trainer", max(row["rollout_train_logprob_abs_diff"] for row in rows)
    )
