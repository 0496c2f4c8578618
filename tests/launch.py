"""Programs as a user starts them: real processes, of which nothing is left when the call returns."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-all"}


def run(
    command: Sequence[str], *, timeout: float, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder; at the end nothing that it started is left, also after a time-out."""
    mark = {"LONGACT_TEST_RUN": uuid.uuid4().hex}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **mark, **(environment or QUIET)},
        cwd=ROOT,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        kill_marked(mark)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_marked(mark: dict[str, str]) -> None:
    """Kill all processes that have `mark` in their environment; torchrun's ranks are no group of ours."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if mark.items() <= process.environ().items():
                process.kill()


def on_ranks(ranks: int, *program: str) -> list[str]:
    """The command that runs a Python program, or a module after -m, on so many ranks of torchrun.

    --standalone: torchrun keeps the store of its ranks itself, on a port that the system picks when it is bound.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]


@contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """The environment by which ranks meet at a store that this process keeps, as torchrun does: none binds a port."""
    from torch.distributed import TCPStore  # not above: pytest-xdist's controller has no use for torch

    store = TCPStore("127.0.0.1", 0, is_master=True)
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    del store  # it listens until here


def demo_model_args() -> list[str]:
    """Megatron's flags of the demo's model."""
    script = 'source examples/demo/model_args.sh; printf "%s\\n" "${MODEL_ARGS[@]}"'
    environment = {name: value for name, value in os.environ.items() if name != "DEMO_DIR"}
    found = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split("\n")[:-1]
