"""A run's folder and checkpoints before it starts: begun, gone on with, or refused; nothing is lost unasked.

A run folder with a run in it is gone on with where `--load` and `--save` name one folder: from its last checkpoint, or
from the start weights if it was killed before the first. Anything else would write over it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TextIO

from megatron_longact.conversion.torch_dist import TRACKER
from megatron_longact.megatron.checkpointing import holds_checkpoint, resume_note, right_pair, same_folder
from megatron_longact.megatron.tool_command import check_folder
from megatron_longact.reporting.run_log import MEGATRON_LOG, METRICS, ROWS, output_in_file, replaced
from megatron_longact.rl.report import PICTURES, REPORT


@contextmanager
def megatron_output(argv: Sequence[str]) -> Iterator[TextIO]:
    """Send Megatron's output into the `--run-dir` of the flags; yields the terminal.

    Without one, and for `--help`, it stays where it is. With `--overwrite` the log is begun anew.
    """
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--run-dir", type=Path)
    early.add_argument("--overwrite", action="store_true")
    early.add_argument("-h", "--help", action="store_true")
    flags = early.parse_known_args(argv)[0]
    if flags.run_dir is None or flags.help:
        yield sys.stdout
        return
    check_folder(flags.run_dir, flag="--run-dir")
    log = flags.run_dir / MEGATRON_LOG
    if flags.overwrite and not started_again() and os.environ.get("RANK", "0") == "0" and log.is_file():
        os.truncate(log, 0)
    with output_in_file(log) as terminal:
        yield terminal


def open_run(args: Namespace, *, say: Callable[[str], None]) -> None:
    """Look at `--run-dir`, `--save` and `--load`, and clear the first two where `--overwrite` asks for it.

    On rank 0, before Megatron starts. say: is given a line that a user should know. Raises `ValueError`, in one line
    that names the way on and the way to start anew, for what would write over a run.
    """
    run_dir, save = Path(args.run_dir), Path(args.save) if args.save else None
    if save is not None:
        check_folder(save, flag="--save")
    _hold(run_dir)
    if args.pretrained_checkpoint and not holds_checkpoint(args.pretrained_checkpoint):
        raise ValueError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint to start from")
    if args.overwrite and not started_again():
        _check_clearable(args)
        _clear(run_dir, save, args.tensorboard_dir)
    found = _found(run_dir, save)
    if found:
        _check_goes_on(args, found)
    start = iteration_of(args.load) if args.ckpt_step is None else args.ckpt_step
    if args.load and start and not args.finetune and not found:
        _check_not_at_its_end(args, start)
    if not args.pretrained_checkpoint and not (args.load and holds_checkpoint(args.load)):
        say("neither --pretrained-checkpoint nor --load holds a checkpoint: the model starts with random weights")
    if args.load and start and not args.finetune:
        say(f"goes on from iteration {start} of {args.load}")
    note = resume_note(args)
    if note is not None:
        say(note)


_HELD: list[TextIO] = []


def _hold(run_dir: Path) -> None:
    """Keep others out of the folder while this process lives; where the file system has no locks nobody is kept out."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / ".lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(
                f"{run_dir} is that of a run that is still going: end it, or give another --run-dir and --save"
            ) from error
    _HELD.append(lock)


def started_again() -> bool:
    """Whether Slurm or torchrun has started this very command before."""
    return any(
        os.environ.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )


def iteration_of(folder: str | Path | None) -> int:
    """The iteration that a checkpoint folder's tracker file names; 0: none, or weights alone."""
    tracker = Path(folder or "", TRACKER)
    text = tracker.read_text().strip() if folder is not None and tracker.is_file() else ""
    return int(text) if text.isdecimal() else 0


def _found(run_dir: Path, save: Path | None) -> str:
    """What is there of a run, as the beginning of a sentence; empty: nothing."""
    saved, rows = iteration_of(save), _last_row(run_dir / METRICS)
    if saved:
        return f"{save} holds a run at iteration {saved}"
    return f"{run_dir} holds a run of {rows} iterations" if rows else ""


def _last_row(path: Path) -> int:
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return int(json.loads(lines[-1])["iteration"]) if lines else 0


def _check_goes_on(args: Namespace, found: str) -> None:
    anew = "another --run-dir and --save, or --overwrite, start anew"
    if not (args.save and args.load and same_folder(args.load, args.save)) or args.finetune:
        without = " without --finetune" if args.finetune else ""
        way_on = f"{right_pair(args)}{without} goes on with it" if args.save else "it has no --save to go on from"
        raise ValueError(f"{found}, which this command would begin again: {way_on}; {anew}")
    saved = iteration_of(args.save)
    if args.ckpt_step is not None and args.ckpt_step < saved:
        raise ValueError(
            f"{found}, and --ckpt-step {args.ckpt_step} goes back behind it: another --run-dir and --save keep both"
        )
    ended = (Path(args.run_dir) / REPORT).is_file() and (not saved or saved >= args.train_iters)
    if ended or saved > args.train_iters:
        more = f"more than --train-iters {args.train_iters} goes on with it" if saved else "it has ended"
        raise ValueError(f"{found}: {more}; {anew}")


def _check_not_at_its_end(args: Namespace, start: int) -> None:
    if start >= args.train_iters:
        raise ValueError(
            f"--load {args.load} is of iteration {start}, and --train-iters is {args.train_iters}: nothing is left to "
            f"train; --pretrained-checkpoint {quote(str(args.load))} starts from its weights at iteration 0"
        )


def _check_clearable(args: Namespace) -> None:
    start = args.pretrained_checkpoint or args.load
    if start and args.save and same_folder(start, args.save):
        raise ValueError(f"--overwrite would remove the weights to start from, {start}: give another --save")


def _clear(run_dir: Path, save: Path | None, tensorboard: str | None) -> None:
    """Remove what a run leaves behind, and nothing else; `megatron.log` is open, and begun anew by who opened it."""
    names = [*ROWS, REPORT, *PICTURES]
    for path in [run_dir / name for name in names] + [replaced(run_dir / name) for name in ROWS]:
        path.unlink(missing_ok=True)
    if save is not None:
        (save / TRACKER).unlink(missing_ok=True)  # first: what is removed half-way is no checkpoint
        for folder in save.glob("iter_*"):
            shutil.rmtree(folder)
    begun = time.time() - time.process_time()  # of this run, at the latest
    for path in Path(tensorboard).glob("events.out.tfevents.*") if tensorboard else ():
        stamp = path.name.split(".")[3]
        if stamp.isdecimal() and int(stamp) < int(begun):  # else it is this run's own
            path.unlink()
