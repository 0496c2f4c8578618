"""The model as a Hugging Face folder, now and then while it trains: out of its checkpoints, by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_longact.conversion.hf_config import DTYPES
from megatron_longact.conversion.model_files import model_files_of

LOG = "exports.log"
"""In the run's folder: what the exports said."""


def check_exports(args: Namespace) -> None:
    """Raise ValueError for flags with which nothing could be exported."""
    interval = args.export_hf_interval
    if not interval:
        return
    if interval < 0:
        raise ValueError(f"--export-hf-interval is {interval}; it must not be negative")
    if not args.save or args.async_save or args.ckpt_format != "torch_dist":
        raise ValueError(
            "--export-hf-interval reads the checkpoints of the run: it needs --save and --ckpt-format torch_dist, and "
            "does not work with --async-save"
        )
    if not any(map(model_files_of, (args.load, args.pretrained_checkpoint, args.save))):
        raise ValueError(
            "--export-hf-interval needs a model that came from Hugging Face, converted by `longact convert to-megatron`"
        )


class Exports:
    """Begins them on the first rank, one at a time; say: is given a line for one that failed."""

    def __init__(self, args: Namespace, *, say: Callable[[str], None]) -> None:
        self._interval, self._save, self._folder = args.export_hf_interval, args.save, Path(args.run_dir)
        self._first, self._say = args.rank == 0, say
        self._running: subprocess.Popen[bytes] | None = None

    def due(self, iteration: int) -> bool:
        """Whether the model is to be exported as it is after that iteration, of which there is to be a checkpoint."""
        return bool(self._interval) and iteration % self._interval == 0

    def begin(self, iteration: int) -> None:
        """Export that checkpoint, after the export that still runs, if any."""
        target = self._folder / f"hf-iter_{iteration:07d}"
        if not self._first or target.exists():
            return
        self.wait()
        command = [sys.executable, "-m", "megatron_longact", "convert", "to-hf"]
        command += ["--load", self._save, "--ckpt-step", str(iteration), "--save", str(target), *self._dtype()]
        with (self._folder / LOG).open("ab") as log:
            self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until none runs: Megatron may remove a checkpoint when it saves the next one."""
        if self._running is not None and self._running.wait():
            self._say(f"an export failed: see {self._folder / LOG}")
        self._running = None

    def _dtype(self) -> list[str]:
        """As config.json has it: a run in fp32 on the CPU gives the model back as it was."""
        files = model_files_of(self._save)
        config = json.loads((files / "config.json").read_text()) if files else {}
        name = config.get("dtype") or config.get("torch_dtype")
        return ["--dtype", name] if name in DTYPES else []
