"""A run folder with a run in it: gone on with, or refused in one line; nothing is lost unasked."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.megatron.checkpointing import check_converted, check_schedule
from megatron_longact.rl import run_folder
from megatron_longact.rl.run_folder import megatron_output, open_run

TRACKER = "latest_checkpointed_iteration.txt"


def checkpoint(folder: Path, iteration: str) -> Path:
    (folder / f"iter_{iteration.zfill(7)}").mkdir(parents=True)
    (folder / TRACKER).write_text(iteration)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of three iterations, and the converted weights that it began with."""
    folder = tmp_path / "run"
    checkpoint(folder / "checkpoints", "3")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i}) + "\n" for i in (1, 2, 3)))
    (folder / "report.md").write_text("# Report")
    checkpoint(tmp_path / "converted", "release")
    return folder


def flags(run: Path, **changed: Any) -> Namespace:
    own = str(run / "checkpoints")
    given = {"run_dir": str(run), "save": own, "load": own, "pretrained_checkpoint": str(run.parent / "converted")}
    given |= {"ckpt_step": None, "finetune": False, "train_iters": 9, "overwrite": False, "tensorboard_dir": None}
    return Namespace(**{**given, **changed})


def opened(args: Namespace) -> list[str]:
    said: list[str] = []
    open_run(args, say=said.append)
    return said


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


def test_a_run_is_gone_on_with(run: Path) -> None:
    before = contents(run)
    assert opened(flags(run)) == [f"goes on from iteration 3 of {run}/checkpoints"]
    assert contents(run) == before
    assert opened(flags(run, ckpt_step=3)) == [f"goes on from iteration 3 of {run}/checkpoints"]


def test_paths_in_advice_can_be_pasted(run: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "two words")
    with pytest.raises(ValueError, match=f"--load '{folder}' --save '{folder}' goes on with it"):
        opened(flags(run, save=folder, load=None))


def test_a_run_that_is_still_going_keeps_its_folder(run: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            with pytest.raises(ValueError, match="is that of a run that is still going"):
                opened(flags(run))
        finally:
            other.kill()
    assert len(opened(flags(run))) == 1


def test_a_file_in_the_place_of_a_folder_is_said_first(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: --save needs a folder there"):
        opened(flags(run, save=str(tmp_path / "file" / "checkpoints")))
    with (
        pytest.raises(ValueError, match="file is a file: --run-dir needs a folder there"),
        megatron_output(["--run-dir", str(tmp_path / "file")]),
    ):
        pass


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"load": "converted", "pretrained_checkpoint": None},
            "begin again: --pretrained-checkpoint converted --load ",
        ),
        ({"load": None, "train_iters": 1}, "again: --pretrained-checkpoint .*converted --load "),
        ({"finetune": True}, "without --finetune goes on with it"),
        ({"save": None, "load": None}, "it has no --save to go on from"),
        ({"train_iters": 1}, "more than --train-iters 1 goes on with it"),
        ({"train_iters": 3}, "more than --train-iters 3 goes on with it"),
        ({"ckpt_step": 2}, "--ckpt-step 2 goes back behind it"),
    ],
)
def test_what_would_write_over_a_run_is_refused(
    run: Path, changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    before = contents(run)
    with pytest.raises(ValueError, match=said) as caught:
        opened(flags(run, **changed))
    assert "another --run-dir" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(run) == before


def test_a_run_that_was_killed_before_its_report_or_its_first_checkpoint_goes_on(run: Path) -> None:
    (run / "report.md").unlink()
    assert opened(flags(run, train_iters=3)) == [f"goes on from iteration 3 of {run}/checkpoints"]
    (run / "checkpoints" / TRACKER).unlink()
    assert opened(flags(run)) == []


def test_overwriting_starts_anew_and_touches_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "notes.txt").write_text("mine")
    args = flags(run, overwrite=True, train_iters=1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job has come back: it goes on
    with pytest.raises(ValueError, match="at iteration 3"):
        opened(args)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(ValueError, match="would remove the weights to start from"):
        opened(flags(run, overwrite=True, pretrained_checkpoint=None))
    assert (run / "report.md").exists()
    assert opened(args) == []
    assert list(contents(run)) == [str(run / "notes.txt")]
    assert (run.parent / "converted" / TRACKER).exists()


def test_a_command_that_will_not_go_on_is_told_so(tmp_path: Path) -> None:
    converted = checkpoint(tmp_path / "converted", "release")
    new = flags(tmp_path / "new", load=str(converted), pretrained_checkpoint=None)
    [said] = opened(new)
    assert f"--pretrained-checkpoint {converted} --load {new.save} --save {new.save} does" in said
    assert opened(flags(tmp_path / "new")) == []
    with pytest.raises(ValueError, match="holds no checkpoint to start from"):
        opened(flags(tmp_path / "new", pretrained_checkpoint=str(tmp_path / "nowhere")))
    checkpoint(tmp_path / "other", "9")
    with pytest.raises(ValueError, match="nothing is left to train; --pretrained-checkpoint"):
        opened(flags(tmp_path / "new", load=str(tmp_path / "other")))


def test_a_hugging_face_folder_is_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="with python -m megatron_longact convert to-megatron --hf-dir"):
        check_converted(Namespace(load=None, pretrained_checkpoint=str(tmp_path)))
    checkpoint(tmp_path, "release")
    check_converted(Namespace(load=str(tmp_path), pretrained_checkpoint=None))


def test_another_schedule_is_refused_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["lr", "min_lr", "lr_decay_iters", "lr_warmup_fraction", "start_weight_decay", "end_weight_decay"]
    saved = Namespace(**dict.fromkeys(names), train_iters=3, global_batch_size=4, lr_warmup_iters=0)
    saved.lr_decay_style, saved.weight_decay_incr_style = "constant", "constant"
    now = Namespace(**{**vars(saved), "train_iters": 9, "load": "x", "ckpt_step": None, "finetune": False})
    now.no_load_optim = now.use_checkpoint_opt_param_scheduler = now.override_opt_param_scheduler = False
    monkeypatch.setattr("megatron_longact.megatron.checkpointing.saved_args", lambda *_: saved)
    with pytest.raises(ValueError, match=r"\(--train-iters 3 there, 9 here\): give --override-opt_param-scheduler"):
        check_schedule(now)
    saved.lr_decay_iters = 3  # as Megatron writes down what was not given
    with pytest.raises(ValueError, match=r"\(--train-iters 3 there, 9 here\)"):
        check_schedule(now)
    now.override_opt_param_scheduler = True
    check_schedule(now)
    now.override_opt_param_scheduler, now.train_iters = False, 3
    check_schedule(now)


def test_output_stays_where_there_is_no_folder_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for argv in ([], ["--run-dir", "run", "--help"]):
        with megatron_output(argv):
            pass
    assert not list(tmp_path.iterdir())
    log = tmp_path / "run" / run_folder.MEGATRON_LOG
    for argv, length in ((["--run-dir=run"], 4), (["--run-dir", "run"], 8), (["--run-dir", "run", "--overwrite"], 4)):
        with megatron_output(argv):
            os.write(1, b"new\n")
        assert log.stat().st_size == length
