"""A Slurm cluster of two nodes on this machine: real munged, slurmctld and slurmd, which end with the block."""

import getpass
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch import ROOT, free_port, kill_marked

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

CONFIG = """
ClusterName=longact
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


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """The cluster, with its files in `folder`."""
    mark = {"LONGACT_TEST_SLURM": uuid.uuid4().hex}
    for name in ("munge", "state", "spool/n0", "spool/n1", "log"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "munge").chmod(0o700)
    config = folder / "slurm.conf"
    values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "cpus": os.cpu_count()}
    config.write_text(CONFIG.format(folder=folder, ports=[free_port() for _ in range(3)], **values))
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
        idle = ["n0 idle", "n1 idle"]
        states = ("sinfo", "--noheader", "--Node", "--format=%N %t")
        wait_for(lambda: sorted(cluster.run(*states).stdout.split("\n"))[1:] == idle, seconds=30, name="two idle nodes")
        yield cluster
    finally:
        cluster.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
        kill_marked(mark)
        for daemon in cluster.daemons:
            daemon.wait(10)


def _start(cluster: Cluster, program: str, *arguments: str) -> None:
    name = "-".join([program, *arguments[-1:]]).replace("/", "_")[:40]
    path = shutil.which(program, path=cluster.environment["PATH"])
    assert path is not None
    with (cluster.folder / "log" / f"{name}.out").open("wb") as log:
        output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        cluster.daemons.append(subprocess.Popen([path, *arguments], env=cluster.environment, **output))
