"""The ranks that the distributed tests run on: a failure is told as it was, and leaves nothing behind."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests import launch, ranks
from tests.launch import ROOT, meeting_place
from tests.ranks import Layout


def place() -> tuple[int, int, int]:
    from megatron.core import parallel_state

    total = [None] * dist.get_world_size()
    dist.all_gather_object(total, dist.get_rank())
    return dist.get_rank(), parallel_state.get_tensor_model_parallel_rank(), len(total)


def fail_on_the_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank gives up")
    dist.barrier()


def hang(folder: str) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    Path(folder, str(dist.get_rank())).write_text(str(child.pid))
    time.sleep(1000)


def test_layouts_follow_each_other_in_one_pool() -> None:
    assert ranks.run(place, layout=Layout(tp=2), world_size=2) == [(0, 0, 2), (1, 1, 2)]
    assert ranks.run(place, layout=Layout(pp=2), world_size=2) == [(0, 0, 2), (1, 0, 2)]


def test_ranks_that_nobody_calls_are_stopped() -> None:
    ranks.close()
    for _ in range(2):
        ranks.run(place, world_size=2)
        idle = [psutil.Process(process.pid) for process in ranks._POOLS[2]._processes]
        assert eventually(lambda: all(process.status() == psutil.STATUS_STOPPED for process in idle))  # noqa: B023


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_rank_that_ends_while_nobody_calls_it_is_named() -> None:
    ranks.run(place, world_size=2)
    process = ranks._POOLS[2]._processes[1]
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with pytest.raises(RuntimeError, match="rank 1 ended while nobody called it"):
        ranks.run(place, world_size=2)
    assert len(ranks.run(place, world_size=2)) == 2


CALLER = """
import os, signal
from tests import ranks
from tests.test_ranks import child_of
if __name__ == "__main__":
    [child] = ranks.run(child_of)
    print(ranks._POOLS[1]._processes[0].pid, child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def child_of() -> int:
    """The process of a manager, such as Megatron's checkpoint writer leaves behind."""
    manager = multiprocessing.get_context("fork").Manager()
    KEPT.append(manager)
    return manager._process.pid


KEPT: list[Any] = []


def test_stopped_ranks_end_with_a_caller_that_is_killed() -> None:
    """With what they started. They write where it wrote: its output ends when the last of them has ended."""
    done = launch.run([sys.executable, "-c", CALLER], timeout=90)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2


def some_tensors() -> dict[str, torch.Tensor]:
    weight = torch.linspace(-3, 3, 12).requires_grad_()
    return {
        "bf16": weight.bfloat16().view(3, 4).T,
        "view": weight.detach()[::5],
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "graph": weight * 2,
    }


def test_tensors_come_back_as_they_were_without_their_graph() -> None:
    [result] = ranks.run(some_tensors)
    for name, wanted in some_tensors().items():
        assert result[name].dtype == wanted.dtype
        assert torch.equal(result[name], wanted), name
        assert not result[name].requires_grad
        result[name].zero_()  # memory of its own


def test_pools_that_start_at_once_do_not_meet() -> None:
    def start(_: int) -> list[tuple[int, int, int]]:
        pool = ranks._Pool(2)
        try:
            return pool.run(place, Layout(tp=2), {}, timeout=60)
        finally:
            pool.kill()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(start, range(4))) == 4 * [[(0, 0, 2), (1, 1, 2)]]


def test_where_ranks_meet_is_bound_before_they_start() -> None:
    with meeting_place() as one, meeting_place() as other:
        ports = [int(place["MASTER_PORT"]) for place in (one, other)]
        assert ports[0] != ports[1]
        with socket.socket() as sock, pytest.raises(OSError, match="in use"):
            sock.bind(("127.0.0.1", ports[0]))
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", ports[0])) != 0


def test_nobody_asks_for_a_port_that_somebody_else_binds() -> None:
    """Between the two it is anybody's: whoever listens binds port 0 itself and tells its number."""
    folders = ("megatron_longact", "tools", "tests", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    asks = re.compile(r"\.getsockname\(|find_free_port|get_free_port")
    assert len(sources) > 100
    assert [str(path) for path in sources if asks.search(path.read_text())] == []


def test_exception_comes_back_with_the_traceback_of_its_rank() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1:.*in fail_on_the_last.*the last rank gives up"):
        ranks.run(fail_on_the_last, world_size=2)
    assert len(ranks.run(place, world_size=2)) == 2


def test_timeout_ends_ranks_and_what_they_started(tmp_path: Path) -> None:
    ranks.run(place, world_size=2)
    with pytest.raises(TimeoutError, match=r"hang: ranks \[0, 1\]"):
        ranks.run(hang, world_size=2, timeout=5, folder=str(tmp_path))
    started = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(started) == 2
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started)
    assert len(ranks.run(place, world_size=2)) == 2
