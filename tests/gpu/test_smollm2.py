"""The GPU tier: a language model's ablation, `examples/smollm2/rl.sh`, on one GPU, with what `make observe` fetched."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import launch
from tests.gpu.models import GPU_TIER
from tests.launch import ROOT

pytestmark = GPU_TIER

MODEL = ROOT / "runs/smollm2/SmolLM2-135M-Instruct"


@pytest.mark.timeout(900)
def test_the_arms_train_on_rulers_tasks(tmp_path: Path, record_property: Any) -> None:
    if not MODEL.is_dir():
        pytest.skip("there is no runs/smollm2: make observe fetches it")
    settings = {"OUT": str(tmp_path), "MODEL": str(MODEL), "GPUS": "1", "ARMS": "dense high gradient", "SEEDS": "1"}
    flags = ["--train-iters", "3", "--rl-prompts-per-eval", "16"]
    command = ["bash", "examples/smollm2/rl.sh", *flags]
    done = launch.run(command, timeout=850, environment=launch.QUIET | settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for arm in ("dense", "high", "gradient"):
        folder = tmp_path / "grpo" / arm / "seed-1"
        assert (folder / "report.md").is_file(), (folder / "output.log").read_text()[-3000:]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [1, 2, 3]
        assert rows[-1]["bf16/changed_qk_frozen"] in (None, 0)
        record_property(f"{arm}, seconds a step", rows[-1]["step_time_s"] + rows[-1]["rollout_time_s"])
