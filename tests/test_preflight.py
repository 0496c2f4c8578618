"""The preflight: each check on what is fit and on what is not, all on two ranks, and a rank that waits in vain."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.conversion import synthetic
from megatron_longact.preflight import disk, gpus, models, software
from megatron_longact.preflight.checks import Finding, Measured, NotHereError, examine, failures, table
from tests import launch
from tests.launch import QUIET, ROOT, meeting_place, on_ranks

START = ROOT / "examples/demo/start_checkpoint"
SHAPE = ["--num-layers", "3", "--hidden-size", "128", "--num-attention-heads", "4"]
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}

without_gpu = pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has a GPU")


def refusal(name: str, *flags: str, world_size: int = 2, hf_dir: Path | None = None) -> str:
    """What a check of the flags has to say against them."""
    parsed = models.flags_of(["examples/train_grpo.py", "--longact", *flags])
    checks = {
        "layout": lambda: models.layout(parsed, world_size=world_size),
        "checkpoint": lambda: models.megatron_checkpoint(parsed),
        "hf": lambda: models.hf_checkpoint(hf_dir, parsed),
    }
    found = examine(name, checks[name])
    assert found.result == "failed", found
    return found.detail


def test_layout() -> None:
    flags = models.flags_of(["--cpu", "x.py", "--tensor-model-parallel-size", "4", "--context-parallel-size", "2"])
    assert models.layout(flags, world_size=16) == "TP 4 x PP 1 x CP 2 x DP 2"
    said = refusal("layout", "--tensor-model-parallel-size", "4", "--context-parallel-size", "2", world_size=12)
    assert said == "12 ranks do not divide into replicas of TP 4 x PP 1 x CP 2 = 8"
    said = refusal("layout", "--tensor-model-parallel-size", "8", "--num-attention-heads", "20", world_size=8)
    assert said == "--num-attention-heads 20 does not divide by TP 8"
    assert "PP 2" in refusal("layout", "--pipeline-model-parallel-size", "2", "--num-layers", "3")


def test_megatron_checkpoint(tmp_path: Path) -> None:
    start = ["--pretrained-checkpoint", str(START), "--load", str(tmp_path)]
    fit = models.megatron_checkpoint(models.flags_of([*start, *SHAPE]))
    assert fit == f"starts from 800 of --pretrained-checkpoint {START}"
    said = refusal("checkpoint", *start, "--num-layers", "4")
    assert "num_layers 3 there, 4 here" in said
    said = refusal("checkpoint", "--pretrained-checkpoint", str(tmp_path))
    assert said.endswith("holds no latest_checkpointed_iteration.txt")
    for flags in ([], ["--load", str(tmp_path)]):  # a run from scratch
        with pytest.raises(NotHereError):
            models.megatron_checkpoint(models.flags_of(flags))
    (tmp_path / models.TRACKER).write_text("")  # cut off by a kill, and no checkpoint
    assert "no complete checkpoint" in refusal("checkpoint", *start)


def test_hf_checkpoint(tmp_path: Path) -> None:
    synthetic.write(CONFIG, tmp_path / "hf")
    flags = ["--num-layers", "2", "--hidden-size", "32", "--num-query-groups", "2"]
    fit = models.hf_checkpoint(tmp_path / "hf", models.flags_of(flags))
    assert fit.startswith("qwen3, ")
    said = refusal("hf", "--num-layers", "2", "--kv-channels", "8", hf_dir=tmp_path / "hf")
    assert said == f"{tmp_path / 'hf'} is a model of another shape: kv_channels 16 there, 8 here"
    (tmp_path / "hf/config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 64}))
    assert "config.json asks for [64, 32]" in refusal("hf", hf_dir=tmp_path / "hf")


def test_disk(tmp_path: Path) -> None:
    folder = tmp_path / "new/checkpoints"
    _, free = disk.space(folder, min_free_gb=0)
    assert free.value == pytest.approx(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize / 1e9, rel=0.2)
    assert examine("disk", lambda: disk.space(folder, min_free_gb=1e9)).result == "failed"
    _, speed = disk.write_speed(folder, rank=0, mib=8, min_mb_s=0)
    assert speed.value > 0
    assert examine("write", lambda: disk.write_speed(folder, rank=0, mib=8, min_mb_s=1e9)).result == "failed"
    assert list(folder.iterdir()) == []
    (tmp_path / "file").touch()
    assert examine("disk", lambda: disk.space(tmp_path / "file", min_free_gb=0)).result == "failed"


@without_gpu
def test_without_a_gpu_its_checks_are_not_here_unless_required() -> None:
    checks = {
        "gpus": lambda: gpus.gpus(wanted=8, kind="H100", min_memory_gib=75),
        "memory": lambda: gpus.memory(0),
        "health": lambda: gpus.health(0),
        "nvlink": lambda: gpus.nvlink(0),
        "te": software.transformer_engine,
    }
    for name, check in checks.items():
        assert examine(name, check).result == "not here"
        assert examine(name, check, required=True).result == "failed"


def test_the_table_has_a_line_for_each_different_finding() -> None:
    def of_rank(rank: int) -> list[Finding]:
        gpu = Finding("gpus", "ok", "8 x H100") if rank != 5 else Finding("gpus", "failed", "7 GPUs are visible")
        return [gpu, Finding("write", "ok", "a rank", Measured(100.0 + rank, "MB/s"))]

    findings = [of_rank(rank) for rank in range(8)]
    rows = [re.split(r"  +", line) for line in table(findings).splitlines()]
    assert rows == [
        ["check", "ranks", "result", "what"],
        ["gpus", "0-4,6-7", "ok", "8 x H100"],
        ["gpus", "5", "failed", "7 GPUs are visible"],
        ["write", "0-7", "ok", "a rank, 100 (rank 0) to 107 MB/s"],
    ]
    nodes = [f"node{rank // 4}" for rank in range(8)]
    assert failures(findings, nodes=nodes) == ["gpus failed on rank 5 (node1): 7 GPUs are visible"]
    assert failures([of_rank(0), of_rank(1)], nodes=nodes) == []


def test_two_ranks_that_are_fit(tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path), "--all-reduce-mib", "8", "--write-mib", "8"]
    program = ["--tensor-model-parallel-size", "2", *SHAPE]
    done = launch.run(on_ranks(2, "tools/preflight.py", *flags, "--", *program), timeout=100)
    assert done.returncode == 0, done.stderr
    shown = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    for name, found in {"layout": "TP 2 x PP 1 x CP 1 x DP 1", "all-reduce": "gloo, 8 MiB on 2 ranks, "}.items():
        assert re.search(rf"^{name} +0-1 +ok  {found}", shown[name]), shown
    speed = re.search(r"([\d.e+-]+) GB/s$", shown["all-reduce"])
    assert speed is not None
    assert float(speed.group(1)) > 0
    assert re.search("^checkpoint +0 +not here  the run starts from no checkpoint", shown["checkpoint"])


def test_what_failed_is_one_line_each_and_an_exit_code(tmp_path: Path) -> None:
    flags = ["--save", str(tmp_path), "--all-reduce-mib", "8", "--write-mib", "8", "--min-all-reduce-gb-s", "1e6"]
    flags += ["--require-gpu"] * (torch.cuda.device_count() == 0)
    done = launch.run(on_ranks(2, "tools/preflight.py", *flags, "--", "--tensor-model-parallel-size", "3"), timeout=100)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("preflight: ")]
    for name in ("layout", "all-reduce", *(("gpus", "transformer engine") if "--require-gpu" in flags else ())):
        [_line] = [line for line in said if line.startswith(f"preflight: {name} failed on rank 0-1 (")]
    assert not any("checkpoint" in line or "nvlink" in line for line in said)


def test_a_rank_that_nobody_joins_says_so() -> None:
    command = [sys.executable, "tools/preflight.py", "--timeout-s", "3"]
    with meeting_place() as place:
        environment = QUIET | place | {"RANK": "0", "WORLD_SIZE": "2"}
        done = launch.run(command, timeout=100, environment=environment)
    assert done.returncode == 1
    assert re.search(
        r"^preflight: rank 0 on \S+ waits for the other ranks: nothing for 3 s$", done.stderr, re.MULTILINE
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no GPU: what the preflight says of one was NOT RUN")
def test_a_gpu_is_looked_at(tmp_path: Path) -> None:
    flags = ["--require-gpu", "--ranks-per-node", "1", "--min-gpu-memory-gib", "1", "--save", str(tmp_path)]
    done = launch.run(on_ranks(1, "tools/preflight.py", *flags), timeout=100)
    assert done.returncode == 0, done.stderr
    for name in ("transformer engine", "gpus", "gpu memory"):
        assert re.search(rf"^{name} +0 +ok  ", done.stdout, re.MULTILINE), done.stdout
