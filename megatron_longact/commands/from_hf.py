"""`longact train --hf-dir`: from a Hugging Face folder to a trained, exported and audited one.

It does what could be typed: `convert to-megatron`, `train`, `convert to-hf`, `export-mask`, `audit`, and shows each of
them. What an earlier call has done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from shlex import join
from typing import Any

from megatron_longact.arguments import add_longact_args, longact_config_from_args
from megatron_longact.commands import audit_update, convert_hf_to_megatron, convert_megatron_to_hf, export_mask
from megatron_longact.conversion.hf_config import DTYPES, read_hf_config
from megatron_longact.conversion.hf_folder import HFFolder
from megatron_longact.conversion.staging import identity
from megatron_longact.conversion.torch_dist import TRACKER
from megatron_longact.megatron.tool_command import check_folder
from megatron_longact.rl.data.arguments import add_data_args, data_config_from_args
from megatron_longact.rl.report import REPORT

_STEPS = {
    "convert to-megatron": convert_hf_to_megatron.main,
    "convert to-hf": convert_megatron_to_hf.main,
    "export-mask": export_mask.main,
    "audit": audit_update.main,
}
DEFAULTS = {"--train-iters": "100", "--lr": "1e-6", "--lr-decay-style": "constant"}
"""Of what neither the folder nor the RL program has an answer to."""
_ON_GPUS = ("--use-distributed-optimizer", "--no-gradient-accumulation-fusion")
_SET_HERE = ("--load", "--pretrained-checkpoint", "--run-dir")
START, CHECKPOINTS, EXPORTED = "start", "checkpoints", "hf"
ROWS, AUDIT, TABLE, SOURCE = "updated-rows.safetensors", "audit.json", "audit.txt", "source.json"
ASKED = "asked.json"
"""What the run that is in `--save` was asked for."""


def parser() -> argparse.ArgumentParser:
    """The flags of these steps; every other one goes to the RL program."""
    made = argparse.ArgumentParser(
        prog="longact train",
        usage="longact train --hf-dir IN --data FILE_OR_SPEC [...] --save OUT [flag ...]",
        epilog="Every other flag goes to the RL program: docs/quickstart.md, docs/program-flags.md, docs/flags.md.",
        allow_abbrev=False,
    )
    made.add_argument("--hf-dir", type=Path, required=True, help="The Hugging Face folder to begin with.")
    made.add_argument("--data", nargs="+", required=True, help="JSONL files, FILE:WEIGHT, needle, ruler:TASK,TASK.")
    made.add_argument("--save", type=Path, required=True, help="Where everything goes.")
    made.add_argument("--nproc-per-node", type=int, help="Ranks. Default: one a GPU; without a GPU one.")
    made.add_argument("--dense", action="store_true", help="Without LongAct.")
    made.add_argument("--cpu", action="store_true", help="On the CPU, also where there is a GPU.")
    made.add_argument("--verbose", action="store_true", help="With what Megatron says.")
    made.add_argument("--overwrite", action="store_true", help="The run anew.")
    return made


def main(argv: list[str]) -> int:
    """Do the steps that are not done yet; 0, or the exit status of the one that failed."""
    args, flags = parser().parse_known_args(argv)
    _check(args, flags)
    _check_run(args, flags)
    if args.overwrite or not _is_trained(args, flags):
        _check_values(args, flags)
    return next(filter(None, (step(args, flags) for step in (_to_megatron, _train, _to_hf, _audit))), 0)


def _check(args: Namespace, flags: Sequence[str]) -> None:
    given = [flag for flag in _SET_HERE if flag in _names(flags)]
    if given:
        raise ValueError(f"{given[0]} does not go with --hf-dir, which sets it: its folders are in --save {args.save}")
    if "RANK" in os.environ:
        raise ValueError(
            "train --hf-dir starts the ranks itself, one a GPU (--nproc-per-node N): call it without torchrun; on "
            "several machines do the steps that it shows one by one"
        )
    read_hf_config(args.hf_dir)
    check_folder(args.save, flag="--save")
    begun, source = args.save / START, args.save / SOURCE
    if begun.exists() and not source.is_file():
        raise ValueError(f"{begun} is there without {SOURCE}, which says of which model it is: give another --save")
    if begun.exists() and json.loads(source.read_text()) != _source(args.hf_dir):
        raise ValueError(f"{args.save} was begun with another model than {args.hf_dir} is now: give another --save")


def _check_values(args: Namespace, flags: Sequence[str]) -> None:
    """Of data and of LongAct, which can be told before a model is converted."""
    made = add_data_args(add_longact_args(argparse.ArgumentParser(add_help=False, allow_abbrev=False)))
    longact = ["--longact"] * (not args.dense)
    known, _ = made.parse_known_args([*longact, "--train-data", *args.data, *flags])
    try:
        data_config_from_args(known)
    except ValueError as error:
        raise ValueError(str(error).replace("--train-data", "--data")) from error
    longact_config_from_args(known)


def _check_run(args: Namespace, flags: Sequence[str]) -> None:
    """Whether the run that is there is the one that is asked for, or may become it."""
    before, now = _recorded(args.save), _asked(args, flags)
    if args.overwrite or before is None:
        return
    if before["dense"] != now["dense"]:
        there, asked = ("without", "with") if before["dense"] else ("with", "without")
        raise ValueError(
            f"{args.save} holds a run {there} LongAct, which does not go on {asked} it: give another --save, or "
            "--overwrite to train anew"
        )
    if _is_trained(args, flags) and before != now:
        raise ValueError(
            f"{args.save} holds a finished run of {_shown(before)}, not of {_shown(now)}: give another --save, more "
            "--train-iters to go on with it, or --overwrite to train anew"
        )


def _asked(args: Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """What makes a run this one and no other: not how long it goes, nor in which order flags are given."""
    given: dict[str, list[str]] = {}
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            given[name] = [value] if equals else []
        elif given:
            given[list(given)[-1]].append(word)
    of_run = {name: values for name, values in sorted(given.items()) if name not in ("--train-iters", "--longact")}
    data = [str(Path(item).resolve()) if Path(item).is_file() else item for item in args.data]
    return {"data": data, "dense": args.dense and "--longact" not in given, "flags": of_run}


def _recorded(save: Path) -> dict[str, Any] | None:
    """What the run that has made the checkpoint was asked for; None where there is none, or nothing is known."""
    tracker, file, begun = save / CHECKPOINTS / TRACKER, save / ASKED, save / f"{ASKED}.partial"
    file = begun if _follows(tracker, begun) else file  # its caller was killed
    if not tracker.is_file() or not file.is_file():
        return None
    asked: dict[str, Any] = json.loads(file.read_text())
    return asked


def _shown(asked: dict[str, Any]) -> str:
    flags = [word for name, values in asked["flags"].items() for word in (name, *values)]
    return join(["--data", *asked["data"], *["--dense"] * asked["dense"], *flags])


def _source(hf_dir: Path) -> list[object]:
    files = {stored.path for stored in HFFolder.open(hf_dir).tensors.values()}
    return [identity(file.resolve()) for file in sorted({hf_dir / "config.json", *files})]


def _names(flags: Sequence[str]) -> set[str]:
    return {word.partition("=")[0] for word in flags}


def _step(name: str, *argv: object) -> int:
    words = [str(word) for word in argv]
    print(f"$ longact {join([*name.split(), *words])}", flush=True)
    return _STEPS[name](words)


def _to_megatron(args: Namespace, flags: Sequence[str]) -> int:
    if (args.save / START).exists():
        return 0
    args.save.mkdir(parents=True, exist_ok=True)
    partial = args.save / f"{SOURCE}.partial"
    partial.write_text(json.dumps(_source(args.hf_dir)))
    partial.replace(args.save / SOURCE)  # before START, which without it would be of no known model
    return _step("convert to-megatron", "--hf-dir", args.hf_dir, "--save", args.save / START)


def _train(args: Namespace, flags: Sequence[str]) -> int:
    """The run, in processes of its own; a signal that comes meanwhile lets them save and end."""
    if _is_trained(args, flags) and not args.overwrite:
        return 0
    gpus = 0 if args.cpu else _gpus()
    ranks = args.nproc_per_node or max(1, gpus)
    words = ["train", *_train_flags(args, flags, gpus=gpus)]
    torchrun = ["--standalone", "--nproc-per-node", str(ranks)]
    shown = ["torchrun", *torchrun, "-m", "megatron_longact"] if ranks > 1 else ["longact"]
    print(f"$ {join([*shown, *words])}", flush=True)
    module = ["-m", "torch.distributed.run", *torchrun] if ranks > 1 else []
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | os.environ  # Megatron asks for it with tensor parallelism
    command = [sys.executable, *module, "-m", "megatron_longact", *words]
    begun = args.save / f"{ASKED}.partial"
    begun.write_text(json.dumps(_asked(args, flags)))
    with subprocess.Popen(command, env=environment) as run:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: run.terminate())
        status = run.wait()
    if _follows(args.save / CHECKPOINTS / TRACKER, begun):
        begun.replace(args.save / ASKED)
    begun.unlink(missing_ok=True)  # of a run that saved nothing
    if not status and not _is_trained(args, flags):
        print("the run ended early: the same command goes on with it", file=sys.stderr)
        return 1
    return status


def _train_flags(args: Namespace, flags: Sequence[str], *, gpus: int) -> list[str]:
    """Those of the RL program: its own first, so that what is given has the last word."""
    out, names = args.save, _names(flags)
    words = [f"--{name}" for name in ("cpu", "verbose") if getattr(args, name)]  # the launcher's, which come first
    words += ["--use-checkpoint-args", "--pretrained-checkpoint", str(out / START)]
    words += ["--load", str(out / CHECKPOINTS), "--save", str(out / CHECKPOINTS), "--run-dir", str(out)]
    words += ["--train-data", *args.data, "--exit-signal-handler", "--override-opt_param-scheduler"]
    words += ["--longact"] * (not args.dense and "--longact" not in names)
    words += [word for flag, value in DEFAULTS.items() if flag not in names for word in (flag, value)]
    if gpus:
        bf16 = ["--bf16"] * (_dtype(args) == ["--dtype", "bfloat16"] and not names & {"--bf16", "--fp16"})
        words += [*bf16, *(flag for flag in _ON_GPUS if flag not in names)]
    return [*words, *["--overwrite"] * args.overwrite, *flags]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _is_trained(args: Namespace, flags: Sequence[str]) -> bool:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--train-iters", type=int, default=int(DEFAULTS["--train-iters"]))
    wanted: int = early.parse_known_args(list(flags))[0].train_iters
    tracker = args.save / CHECKPOINTS / TRACKER
    done = tracker.read_text().strip() if tracker.is_file() else ""
    return (args.save / REPORT).is_file() and done.isdecimal() and int(done) >= wanted


def _dtype(args: Namespace) -> list[str]:
    """The weights' own, also after a run in another one."""
    dtype = read_hf_config(args.hf_dir).dtype
    return [word for name, known in DTYPES.items() if known is dtype for word in ("--dtype", name)]


def _to_hf(args: Namespace, flags: Sequence[str]) -> int:
    exported, tracker = args.save / EXPORTED, args.save / CHECKPOINTS / TRACKER
    if exported.exists():
        if exported.stat().st_mtime > tracker.stat().st_mtime:
            return 0
        stale = args.save / f"{EXPORTED}.stale"  # of this run, before it went on: never half of it as EXPORTED
        shutil.rmtree(stale, ignore_errors=True)
        exported.rename(stale)
        shutil.rmtree(stale)
    return _step("convert to-hf", "--load", args.save / CHECKPOINTS, "--save", exported, *_dtype(args))


def _audit(args: Namespace, flags: Sequence[str]) -> int:
    out, mask = args.save, []
    if _follows(out / AUDIT, out / EXPORTED) and (out / TABLE).is_file():
        return _tell(out)
    (out / TABLE).unlink(missing_ok=True)  # of before; it is written last
    if not args.dense:
        rows = ("--load", out / CHECKPOINTS, "--save", out / ROWS)
        if status := _step("export-mask", "--union", *rows, "--overwrite"):
            return status
        mask = ["--mask", out / ROWS]
    words = [args.hf_dir, out / EXPORTED, *mask, "--json", out / AUDIT, "--overwrite"]
    with StringIO() as table, redirect_stdout(table):
        status = _step("audit", *words)
        text = table.getvalue()
    print(text.partition("\n")[0])
    if not status:
        (out / TABLE).write_text(text)
    return status or _tell(out)


def _follows(later: Path, earlier: Path) -> bool:
    return later.is_file() and earlier.exists() and later.stat().st_mtime > earlier.stat().st_mtime


def _tell(out: Path) -> int:
    """What came of it; 1 where rows changed that were in no mask."""
    print((out / TABLE).read_text().splitlines()[-1])
    print(f"{out / EXPORTED} is the trained model; {out / TABLE} says what changed in it, {out / REPORT} the rest")
    return int(bool(json.loads((out / AUDIT).read_text())["total"]["changed_outside"]))
