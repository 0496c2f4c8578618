"""A Slurm cluster of two nodes on this machine: real munged, slurmctld and slurmd, which end with the block.

Slurm's daemons know each other's ports from a file, so none can bind whatever is free and tell. Clusters have numbers,
each held on this machine while its cluster lives, with ports and job numbers of their own (a job's number makes its
MASTER_PORT), below the ports that the system gives away. If something else listens there, the next number is tried.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.launch import ROOT, kill_marked

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
MOST, FIRST_PORT, PORTS, JOBS = 10, 7100, 3, 1000

CONFIG = """
ClusterName=longact
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
KillWait=3
ReturnToService=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def missing() -> list[str]:
    """Slurm's daemons that this machine does not have."""
    return [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


class Cluster:
    """Commands of a running cluster."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, timeout: float = 30, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command against it, in the project's folder."""
        return subprocess.run(
            command,
            env=self.environment | environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def output(self, *command: str, **environment: str) -> str:
        """What a command that must succeed says."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """A job's state, as `scontrol` has it."""
        fields = dict(part.split("=", 1) for part in self.output("scontrol", "show", "job", job).split() if "=" in part)
        return fields["JobState"]


def wait_for(what: Callable[[], bool], *, seconds: float, name: str) -> None:
    """Return when it is true; an assertion error after so many seconds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds:g} s for {name}"
        time.sleep(0.2)


class PortTakenError(Exception):
    """Somebody else has a port of this cluster's number."""


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """The cluster, with its files below `folder`."""
    with ExitStack() as stack:
        yield _first_that_starts(stack, folder)


def _first_that_starts(stack: ExitStack, folder: Path) -> Cluster:
    for number in range(MOST):
        with suppress(PortTakenError):
            stack.enter_context(_reserved(number))
            return stack.enter_context(_started(folder / str(number), number))
    raise RuntimeError(f"none of {MOST} clusters got its ports, {FIRST_PORT} to {FIRST_PORT + MOST * PORTS - 1}")


@contextmanager
def _reserved(number: int) -> Iterator[None]:
    """Hold a cluster's number on this machine; `PortTakenError` if another cluster does."""
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(f"\0longact-slurm-{number}")  # an abstract name: no file, and gone with its holder
        except OSError as error:
            raise PortTakenError from error
        yield


@contextmanager
def _started(folder: Path, number: int) -> Iterator[Cluster]:
    mark = {"LONGACT_TEST_SLURM": uuid.uuid4().hex}
    for name in ("munge", "state", "spool/n0", "spool/n1", "log"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "munge").chmod(0o700)
    config = folder / "slurm.conf"
    values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "cpus": os.cpu_count()}
    ports = [FIRST_PORT + number * PORTS + i for i in range(PORTS)]
    config.write_text(CONFIG.format(folder=folder, ports=ports, first_job=1 + number * JOBS, **values))
    path = f"{os.environ['PATH']}:{SBIN}"
    cluster = Cluster(folder, os.environ | mark | {"SLURM_CONF": str(config), "PATH": path})
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "seed-file")
    ]
    try:
        _start(cluster, "munged", "--foreground", "--force", f"--log-file={folder}/log/munge.log", *munge)
        wait_for((folder / "munge/socket").exists, seconds=10, name="munged")
        _start(cluster, "slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            _start(cluster, "slurmd", "-D", "-N", node)
        wait_for(lambda: _idle(cluster), seconds=30, name="two idle nodes")
        yield cluster
    finally:
        cluster.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
        kill_marked(mark)
        for daemon in cluster.daemons:
            daemon.wait(10)


def _idle(cluster: Cluster) -> bool:
    """Whether both nodes wait for jobs; an error when a daemon has ended instead."""
    if any(daemon.poll() is not None for daemon in cluster.daemons):
        said = "\n".join(path.read_text(errors="replace") for path in (cluster.folder / "log").iterdir())
        if "Address already in use" in said:
            raise PortTakenError
        raise AssertionError(f"a daemon ended:\n{said}")
    states = cluster.run("sinfo", "--noheader", "--Node", "--format=%N %t").stdout.split("\n")
    return sorted(states)[1:] == ["n0 idle", "n1 idle"]


def _start(cluster: Cluster, program: str, *arguments: str) -> None:
    name = "-".join([program, *arguments[-1:]]).replace("/", "_")[:40]
    path = shutil.which(program, path=cluster.environment["PATH"])
    assert path is not None
    with (cluster.folder / "log" / f"{name}.out").open("wb") as log:
        output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        cluster.daemons.append(subprocess.Popen([path, *arguments], env=cluster.environment, **output))
