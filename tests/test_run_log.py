"""What a run shows and leaves behind."""

import io
import json
import logging
import os
import select
import subprocess
import sys
import warnings
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from megatron_longact.reporting.run_log import (
    EVALUATIONS,
    HELDOUT,
    MetricsLog,
    Progress,
    RunLog,
    output_in_file,
    replaced,
)


def test_a_terminal_gets_one_line_redrawn() -> None:
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        progress = Progress(4, terminal)
        progress.update(1, {"reward": "0.100"})
        progress.update(2, {"reward": "0.200"})
        progress.say("a line that stays")
        progress.close()
        shown, poll = "", select.poll()
        poll.register(ours, select.POLLIN)
        while poll.poll(1000):
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.count("\n") == 2
    assert "[######..................] 1/4  reward 0.100" in shown
    assert shown.count("\r\x1b[2K") == 3
    assert "left" in shown


def test_a_file_gets_a_line_now_and_then_and_the_last() -> None:
    out = io.StringIO()
    progress = Progress(100, out, interval_s=3600)
    for iteration in range(1, 101):
        progress.update(iteration, {})
    assert out.getvalue().splitlines() == ["[########################] 100/100    0:00 in all"]
    often = io.StringIO()
    progress = Progress(3, often, interval_s=0)
    for iteration in (1, 2, 3):
        progress.update(iteration, {})
    assert len(often.getvalue().splitlines()) == 3
    assert "\x1b" not in often.getvalue()


def test_a_line_that_must_be_seen_does_not_wait() -> None:
    out = io.StringIO()
    progress = Progress(100, out, interval_s=3600)
    progress.update(1, {"reward": "0.1"})
    progress.update(2, {"no signal:": "constant-reward"}, now_too=True)
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["no signal: constant-reward"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_go_to_the_file_and_to_tensorboard(tmp_path: Path) -> None:
    path, writer = tmp_path / "metrics.jsonl", SummaryWriter(tmp_path)
    log = MetricsLog(path, writer)
    log.write({"loss": 0.5, "kl": None, "norm": float("inf"), "by": {"64": 1.0}}, iteration=3, in_tensorboard={"norm"})
    log.close()
    writer.close()
    assert rows(path) == [{"iteration": 3, "loss": 0.5, "kl": None, "norm": None, "by": {"64": 1.0}}]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]


def test_a_resumed_run_writes_its_rows_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, None)
    for iteration in (1, 2, 3):
        log.write({"loss": 0.0}, iteration=iteration)
    log.close()
    log = MetricsLog(path, None, resume_from=2)
    log.write({"loss": 1.0}, iteration=3)
    log.close()
    assert [(row["iteration"], row["loss"]) for row in rows(path)] == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert rows(replaced(path)) == [{"iteration": 3, "loss": 0.0}]  # moved aside, not lost
    assert replaced(path).name == "metrics.replaced.jsonl"


def test_an_evaluation_that_is_made_again_is_not_there_twice(tmp_path: Path) -> None:
    """Also the first one, of a run that was killed before its first checkpoint."""
    for accuracy in (0.25, 0.5):
        log = RunLog(tmp_path, io.StringIO(), None, total=9, done=0, evaluated=-1)
        log.write_evaluation({"iteration": 0, "accuracy": accuracy}, {})
        log.write_answers(HELDOUT, [{"response": "\ud800 é"}], "", iteration=0)
        log.close()
    assert [row["accuracy"] for row in rows(tmp_path / EVALUATIONS)] == [0.5]
    assert rows(tmp_path / HELDOUT) == [{"iteration": 0, "response": "\ud800 é"}]
    assert "é" in (tmp_path / HELDOUT).read_text("utf-8")
    log = RunLog(tmp_path, io.StringIO(), None, total=9, done=0, evaluated=0)
    log.close()
    assert len(rows(tmp_path / EVALUATIONS)) == 1


CHATTER = """
import logging, subprocess, sys, warnings
from pathlib import Path
from megatron_longact.reporting.run_log import output_in_file
print("before", flush=True)
with output_in_file(Path(sys.argv[1])) as terminal:
    print("chatter")
    subprocess.run(["echo", "of a child"], check=True)
    logging.getLogger("megatron.core").warning("a record")
    warnings.warn("a warning")
    print("progress", file=terminal)
    print("an error", file=sys.stderr)
print("after")
"""


def test_a_row_that_a_kill_cut_off_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "loss": 0.5}\n{"iteration": 2, "lo')
    log = MetricsLog(path, None, resume_from=2)
    log.write({"loss": 0.25}, iteration=2)
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.5, 0.25]


def test_output_goes_to_the_file_and_errors_do_not(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "megatron.log"
    heard = {
        name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"
    }  # tools that tests call set it
    done = subprocess.run(
        [sys.executable, "-c", CHATTER, str(log)], capture_output=True, text=True, check=True, env=heard
    )
    assert done.stdout.split() == ["before", "progress", "after"]
    assert done.stderr.strip() == "an error"
    kept = log.read_text()
    for expected in ("chatter", "of a child", "a record", "a warning"):
        assert expected in kept


def test_output_comes_back_after_an_exception(tmp_path: Path) -> None:
    descriptors, handlers = os.listdir("/dev/fd"), list(logging.getLogger().handlers)
    showwarning = warnings.showwarning
    try:
        with output_in_file(tmp_path / "log"):
            raise KeyError
    except KeyError:
        pass
    assert len(os.listdir("/dev/fd")) == len(descriptors)
    assert logging.getLogger().handlers == handlers
    assert warnings.showwarning is showwarning
