"""Kill ranks of a run at random moments, start it again each time, and hold it against a run that was left alone.

    python tools/kill_and_resume.py --work-dir runs/kills --kills 24

Each kill is SIGKILL to one rank: half of them at any moment after the start, half while a checkpoint is being
written. After the last one the run goes on to its end. Its metrics and its last checkpoint must be, to the bit,
those of the run that was not killed, and each start must go on from the last complete checkpoint.

A run of one's own comes after `--`, with {dir} where its folder goes and ranks that `torchrun` starts:

    python tools/kill_and_resume.py --work-dir runs/kills -- torchrun ... --save {dir}/checkpoints --run-dir {dir}
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_longact.commands.compare_checkpoints import compare, differences
from megatron_longact.megatron.quiet import quiet_libraries

MARK = "LONGACT_KILL_AND_RESUME"
AIMS = ("any moment", "a save")
SHELL_FOUND_NO_PROGRAM = (126, 127)
TIMES = ("time", "_s")
"""Metrics whose names hold one of these are wall times, which differ."""

DEMO = """
source examples/demo/model_args.sh
exec {python} -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_longact.run --cpu examples/train_grpo.py "${MODEL_ARGS[@]}" \
    --tensor-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --context-lengths 48 64 --max-response-length 16 --seq-length 80 \
    --grpo-prompts-per-step 4 --grpo-group-size 4 --global-batch-size 8 --micro-batch-size 8 --grpo-iterations 2 \
    --grpo-kl-beta 0.001 --rl-prompts-per-eval 8 --eval-interval 1000 --inference-max-requests 16 \
    --train-iters 300 --lr 1e-4 --min-lr 1e-5 --lr-decay-style linear --log-interval 1 --seed 1 \
    --longact --longact-ema 0.5 --longact-refresh-interval 2 \
    --pretrained-checkpoint "$DEMO_DIR/start_checkpoint" --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable \
    --load "$0/checkpoints" --save "$0/checkpoints" --save-interval 1 --save-retain-interval 1000 --run-dir "$0"
"""
"""With the run's folder as its first argument."""


@dataclass(frozen=True)
class Kill:
    """One kill: when, whom, what the tracker file said before the start and after it, iterations lost."""

    aim: str
    seconds: float
    rank: int
    last_complete: int
    reached: int
    ended_by_itself: bool

    @property
    def lost(self) -> int:
        """Iterations that are made again."""
        return self.reached - self.last_complete


class Run:
    """A command and the folder it writes to."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._command = [part.replace("{dir}", str(folder)) for part in command]
        # torchrun lies beside the Python that runs this, which need not be on the PATH
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._mark = {MARK: uuid.uuid4().hex}
        self._environment = {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ}
        self._environment |= {"PATH": path, **self._mark}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, with its output in `output.log`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output.log").open("ab") as log:
            output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            try:
                self._process = subprocess.Popen(self._command, env=self._environment, **output)
            except OSError as error:
                raise SystemExit(f"{self._command[0]} could not be started: {error.strerror}") from error

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None after so many seconds."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def how_it_ended(self) -> str:
        """What its exit code says, with the last line of its output if it did not come to its end."""
        code = self.wait(0)
        if code == 0:
            return "came to its end: give it more iterations"
        said = (self.folder / "output.log").read_text(errors="replace").strip().splitlines()[-1:]
        what = "could not be started" if code in SHELL_FOUND_NO_PROGRAM else "failed"
        return f"{what}, exit code {code}: {''.join(said)}"

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in self._processes():
            with suppress(psutil.Error):
                rank, command = process.environ().get("RANK"), process.cmdline()
                if rank is not None and not any("multiprocessing" in part for part in command):
                    found.setdefault(int(rank), process)
        return found

    def clean_up(self) -> None:
        """Kill whatever it left behind: a killed rank's checkpoint writers have nobody who ends them."""
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        if self._process is not None:
            self._process.wait()

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self._mark.items() <= process.environ().items():
                    yield process

    def last_complete(self) -> int:
        """The iteration that the tracker file names; 0: none."""
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        text = tracker.read_text().strip() if tracker.is_file() else ""
        return int(text) if text else 0

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the iterations, wall times left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = []
        for line in lines:
            with suppress(json.JSONDecodeError):  # a row that was being written
                rows.append({k: v for k, v in json.loads(line).items() if not any(t in k for t in TIMES)})
        return rows

    def reached(self) -> int:
        """The last iteration with metrics."""
        rows = self.rows()
        return rows[-1]["iteration"] if rows else 0


def demo() -> list[str]:
    """The demo's model on short prompts, with the Python that runs this."""
    return ["bash", "-c", DEMO.replace("{python}", shlex.quote(sys.executable)), "{dir}"]


def wait_for_save(run: Run, *, seconds: float) -> None:
    """Return when a checkpoint folder that was not there appears, a save has begun, or when the run has ended."""
    before = set(run.checkpoints.glob("iter_*"))
    end = time.monotonic() + seconds
    while time.monotonic() < end and not set(run.checkpoints.glob("iter_*")) - before and run.wait(0) is None:
        time.sleep(0.002)


def kill_once(run: Run, *, aim: str, horizon: float, save_seconds: float, patience: float) -> Kill | None:
    """Start the run and kill one rank of it; None if it ended first."""
    begun = time.monotonic()
    run.start()
    if aim == "any moment":
        run.wait(random.uniform(0, horizon))
    else:
        wait_for_save(run, seconds=10 * horizon)
        time.sleep(random.uniform(0, save_seconds))
    while not (ranks := run.ranks()) and run.wait(0.05) is None:
        pass
    if not ranks:
        return None
    rank, process = random.choice(sorted(ranks.items()))
    with suppress(psutil.NoSuchProcess):
        process.kill()
    seconds = time.monotonic() - begun
    ended = run.wait(patience) is not None
    run.clean_up()
    return Kill(aim, round(seconds, 2), rank, run.last_complete(), run.reached(), ended)


def finish(run: Run, *, seconds: float) -> None:
    """Let it come to its end."""
    run.start()
    code = run.wait(seconds)
    run.clean_up()
    if code != 0:
        how = f"took more than {seconds:g} s" if code is None else run.how_it_ended()
        raise SystemExit(f"the run in {run.folder} {how}; see {run.folder}/output.log")


def table(kills: list[Kill]) -> str:
    """A Markdown table of the kills."""
    lines = ["| kill | aimed at | seconds after the start | rank | last complete | reached | lost |", "|" + "---|" * 7]
    for number, kill in enumerate(kills, 1):
        cells = (number, kill.aim, kill.seconds, kill.rank, kill.last_complete, kill.reached, kill.lost)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Make both runs, print the kills, and say whether the two are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where the folders killed/ and reference/ go")
    parser.add_argument("--overwrite", action="store_true", help="make these folders anew where they are there")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the victims")
    parser.add_argument("--horizon", type=float, default=35.0, help="a kill at any moment comes within these seconds")
    parser.add_argument("--save-seconds", type=float, default=0.4, help="how long a save takes")
    parser.add_argument("--patience", type=float, default=90.0, help="for the other ranks to end by themselves")
    parser.add_argument("--run-seconds", type=float, default=1800.0, help="for a whole run")
    parser.add_argument("command", nargs="*", help="after --; the demo's model on short prompts if not given")
    args = parser.parse_args()
    command = args.command or demo()
    random.seed(args.seed)
    for name in ("killed", "reference"):
        if (args.work_dir / name).exists() and not args.overwrite:
            parser.error(f"{args.work_dir / name} is there already: give another --work-dir, or --overwrite")
        shutil.rmtree(args.work_dir / name, ignore_errors=True)
    killed, reference = Run(command, args.work_dir / "killed"), Run(command, args.work_dir / "reference")
    kills: list[Kill] = []
    try:
        while len(kills) < args.kills:
            kill = kill_once(
                killed,
                aim=AIMS[len(kills) % len(AIMS)],
                horizon=args.horizon,
                save_seconds=args.save_seconds,
                patience=args.patience,
            )
            if kill is None:
                how = killed.how_it_ended()
                raise SystemExit(f"after {len(kills)} kills the run {how}; see {killed.folder}/output.log")
            kills.append(kill)
            print(json.dumps(asdict(kill)), flush=True)
        for run in (killed, reference):
            finish(run, seconds=args.run_seconds)
    finally:
        for run in (killed, reference):
            run.clean_up()
    return judge(killed, reference, kills)


def judge(killed: Run, reference: Run, kills: list[Kill]) -> int:
    """Print what came out; 0 if the killed run is, to the bit, the one that was left alone."""
    last = f"iter_{reference.last_complete():07d}"
    found = [
        *differences(killed.rows(), reference.rows(), "metrics"),
        *compare(killed.checkpoints / last, reference.checkpoints / last),
    ]
    hung = sum(not kill.ended_by_itself for kill in kills)
    if any(kill.lost > 1 for kill in kills):
        found.append("more was lost than the iteration since the last checkpoint")
    print(f"\n{table(kills)}\n\n{len(kills)} kills; {hung} times the other ranks had to be ended")
    print("\n".join(found) or f"metrics of {len(reference.rows())} iterations and {last}: equal to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # main then ends what it has started
    quiet_libraries()
    raise SystemExit(main())
