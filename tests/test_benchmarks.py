"""The benchmarks at sizes that say nothing of speed: what they print and write, and what they refuse."""

import json
import time
from pathlib import Path

import pytest
import torch

from megatron_longact import metrics
from tests.launch import ROOT
from tests.ranks import run_program

SMALL = ["--hidden-size", "64", "--kv-channels", "16", "--num-layers", "2", "--seq-length", "64", "--vocab-size", "64"]


def run(tool: str, *flags: str) -> tuple[int, str, str]:
    done = run_program(str(ROOT / "tools" / tool), *flags, launcher=False, cpu=False, timeout=100)
    return done.returncode, done.stdout, done.stderr


class LateEvent(metrics.HostEvent):
    """An event of a device that is some records behind its host."""

    made, recorded, behind = 0, 0, 100

    def __init__(self) -> None:
        super().__init__()
        LateEvent.made += 1

    def record(self) -> None:
        super().record()
        LateEvent.recorded += 1
        self.at = LateEvent.recorded

    def query(self) -> bool:
        return self.at + self.behind <= LateEvent.recorded


def test_a_stopwatch_that_nobody_reads_holds_no_more_than_the_device_is_behind() -> None:
    watch = metrics.Stopwatch(torch.device("cpu"), LateEvent)
    part, begun = watch.part(metrics.CAPTURE), time.perf_counter()
    for _ in range(20_000):
        with part:
            pass
    assert LateEvent.made <= LateEvent.behind + 3
    assert 0 < watch.read() < time.perf_counter() - begun
    assert watch.read() == 0


def test_capture_is_measured_against_a_copy(tmp_path: Path) -> None:
    output = tmp_path / "capture.json"
    shape = ["--num-attention-heads", "8", "--num-query-groups", "4", "--kv-channels", "16"]
    code, out, err = run("benchmark_capture.py", "--tokens", "256", "--repeats", "2", *shape, "--output", str(output))
    assert code == 0, err
    numbers = json.loads(output.read_text())
    results = numbers["results"]
    assert len(results) == 2 * (3 * 2 * 4 - 2)  # TP 1 and 4; no product gives a maximum
    assert {r["candidate"] for r in results} == {"reduce", "norm", "whole", "matmul"}
    for result in results:
        assert result["of_the_copy"] == pytest.approx(result["gb_per_s"] / numbers["copy_gb_per_s"])
        assert result["error"] < (0.02 if result["candidate"] == "matmul" else 1e-5), result
        assert result["temporaries"] > (1.0 if result["candidate"] == "whole" else 0.0)
    assert len([line for line in out.splitlines() if line.startswith("| 256 |")]) == len(results)


def test_a_profile_of_a_step_shows_the_ranges(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    code, out, err = run("profile_step.py", *SMALL, "--steps", "2", "--output", str(trace))
    assert code == 0, err
    rows = {cells[1].strip(): cells for line in out.splitlines() if len(cells := line.split("|")) == 6}
    assert rows.keys() >= {"step", *metrics.RANGES}
    assert [rows[name][2].strip() for name in metrics.RANGES] == ["4", "1", "1", "1", "1"]
    assert rows["step"][4].strip() == "100.00%"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert [names.count(name) for name in metrics.RANGES] == [8, 2, 2, 2, 2]


def test_a_whole_step_is_measured_against_a_dense_one(tmp_path: Path) -> None:
    output = tmp_path / "overhead.json"
    code, out, err = run("benchmark_overhead.py", *SMALL, "--rounds", "2", "--recompute", "--output", str(output))
    assert code == 0, err
    (measured,) = json.loads(output.read_text())["runs"]
    assert measured["arms"].keys() == {"dense", "refresh", "keep", "naive"}
    for arm in measured["arms"].values():
        assert len(arm["seconds"]) == 2
        assert min(arm["peak_bytes"], arm["allocated_bytes"]) > 0
    assert "GiB between steps" in out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][1:] == [
        "refresh interval 1",
        "refresh interval 10",
        "naive masks and copies",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_is_refused_where_there_is_none() -> None:
    code, _, err = run("benchmark_overhead.py", "--dtype", "bf16", "--fp8", "hybrid")
    assert code == 2
    assert err.splitlines()[-1].endswith("--fp8 needs a GPU and --dtype bf16")


def test_shared_prompts_are_measured_against_rows_apart(tmp_path: Path) -> None:
    output = tmp_path / "shared.json"
    model = ["--num-layers", "1", "--hidden-size", "64", "--ffn-hidden-size", "64", "--kv-channels", "16"]
    model += ["--num-query-groups", "2", "--vocab-size", "64"]
    flags = ["--shapes", "32+4x4", "--rounds", "1", "--output", str(output)]
    code, out, err = run("benchmark_shared_prompts.py", *model, *flags)
    assert code == 0, err
    assert "| 32 + 4, 4 | 288 → 96 |" in out
    [result] = json.loads(output.read_text())["runs"]
    assert result["shape"] == {"prompt": 32, "response": 4, "group": 4, "responses": 8}
    for arm in result["arms"].values():
        assert len(arm["steps"]) == len(arm["log_probs"]) == 1
        assert arm["peak_bytes"] > 0
