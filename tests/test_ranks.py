"""The ranks that the distributed tests run on: a failure is told as it was, and leaves nothing behind."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests import ranks
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
