"""Real ranks over gloo, kept alive and reused: importing Megatron takes seconds, forking it does not.

    results = ranks.run(function, layout=Layout(tp=2), world_size=4, **kwargs)   # one result a rank
    done = ranks.run_program("program.py", "--its-flags", world_size=2)          # a fresh process a rank

`function` is a module-level function. A fork server imports Megatron once, in CPU mode; the ranks of a world
size are forked from it at first use, and stopped while nobody calls them. Calls that follow each other at one layout
share Megatron's groups and parallel state. A rank's exception is raised here with its traceback. After an error or
a time-out the pool is killed, with everything it started, and made anew at the next call.
"""

import atexit
import ctypes
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.launch import meeting_place

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.megatron_in_cpu_mode"])
_POOLS: dict[int, "_Pool"] = {}
_LAZILY = {"TORCH_GLOO_LAZY_INIT": "1"}
"""Megatron makes two dozen groups for a layout; most are never used, and those connect no ranks then."""
_PR_SET_PDEATHSIG = 1
_MOST_THREADS = 160
"""Each gloo group has threads that wake up now and then, and Megatron keeps some groups for ever."""


@dataclass(frozen=True)
class Layout:
    """Megatron's parallel sizes; what is left of the world is data parallel."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1


def run(
    function: Callable[..., Any],
    *,
    layout: Layout | None = None,
    world_size: int = 1,
    timeout: float = 100,
    **kwargs: Any,
) -> list[Any]:
    """Run `function(**kwargs)` on every rank, with Megatron's parallel state set up; the results by rank."""
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = _Pool(world_size)
    try:
        results = pool.run(function, layout or Layout(), kwargs, timeout)
    except BaseException:
        _POOLS.pop(world_size).kill()
        raise
    if pool.num_threads() > _MOST_THREADS:
        _POOLS.pop(world_size).kill()
    return results


def run_program(
    *command: str, world_size: int = 1, launcher: bool = True, cpu: bool = True, timeout: float = 140
) -> subprocess.CompletedProcess[str]:
    """Run `python -m megatron_longact.run --cpu COMMAND` on fresh ranks, which have imported Megatron already, no more.

    As under torchrun the first rank that fails ends the others. Output is that of rank 0, then that of the others.
    launcher: False runs `python COMMAND --cpu`, a tool; cpu: False leaves that flag out, which some tools do not have.
    """
    environment = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    environment |= {"OMP_NUM_THREADS": "1", "LONGACT_TRACEBACK": "", **_LAZILY}
    arguments = ["--cpu", *command] if launcher else [*command, *["--cpu"] * cpu]
    with tempfile.TemporaryDirectory() as folder, meeting_place() as place:
        environment |= place
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(world_size)]
        processes = [
            _CONTEXT.Process(
                target=_program_main,
                args=(arguments, launcher, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, *outputs[rank]),
                daemon=False,
            )
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            code = _wait_for(processes, deadline=time.monotonic() + timeout)
        finally:
            _kill(processes)
        out, err = ("".join(pair[i].read_text(errors="replace") for pair in outputs) for i in (0, 1))
    if code is None:
        raise TimeoutError(f"{command[0]} took more than {timeout} s:\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, code, out, err)


def _wait_for(processes: list[Any], *, deadline: float) -> int | None:
    """The exit code of the first that fails, 0 when all have ended well; None after the deadline."""
    running = list(processes)
    while running:
        if not wait([p.sentinel for p in running], timeout=max(0.0, deadline - time.monotonic())):
            return None
        ended = [p for p in running if p.exitcode is not None]
        running = [p for p in running if p.exitcode is None]
        failed = [p.exitcode for p in ended if p.exitcode]
        if failed:
            return int(failed[0])
    return 0


def _program_main(command: Sequence[str], launcher: bool, environment: dict[str, str], out: Path, err: Path) -> None:
    _end_with_the_caller()
    os.setsid()  # so that what a rank starts ends with it
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # not that of the fork server
    logging.disable(logging.NOTSET)
    from torch import set_num_threads

    from megatron_longact.run import main

    set_num_threads(1)
    if "--save" in command:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        # the process that a checkpoint writer's results pass through: Megatron spawns it, and it imports torch anew
        filesystem_async.get_write_results_queue("fork")
    if launcher:
        sys.argv[:] = ["megatron_longact.run", *command]
        sys.exit(main(list(command)))
    sys.argv[:] = command
    sys.path[0] = str(Path(command[0]).resolve().parent)
    runpy.run_path(command[0], run_name="__main__")


@atexit.register
def close() -> None:
    """End all ranks."""
    while _POOLS:
        _POOLS.popitem()[1].kill()


def _kill(processes: Iterable[Any]) -> None:
    """Kill processes that lead a session of their own, with everything that they started."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(5)
        with suppress(ValueError):  # it has not ended
            process.close()  # its descriptor


class _Pool:
    def __init__(self, world_size: int) -> None:
        self._connections, self._processes, self._stack = [], [], ExitStack()
        environment = {"WORLD_SIZE": str(world_size), **_LAZILY} | self._stack.enter_context(meeting_place())
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            # not a daemon: those may not start processes, and Megatron's checkpoint writer does
            process = _CONTEXT.Process(target=_rank_main, args=(theirs, rank, environment), daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], layout: Layout, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        self._signal(signal.SIGCONT)
        for connection in self._connections:
            connection.send((function, layout, kwargs))
        results = self._results(function.__name__, timeout)
        self._signal(signal.SIGSTOP)  # each group has a thread that looks for work a hundred times a second
        return results

    def _signal(self, number: signal.Signals) -> None:
        for rank, process in enumerate(self._processes):
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:
                raise RuntimeError(f"rank {rank} ended while nobody called it") from None

    def _results(self, name: str, timeout: float) -> list[Any]:
        deadline, results = time.monotonic() + timeout, {}
        while len(results) < len(self._connections):
            left = [c for i, c in enumerate(self._connections) if i not in results]
            ready = wait(left, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{name}: ranks {sorted(set(range(len(self._connections))) - set(results))}")
            for connection in ready:
                rank = self._connections.index(connection)
                ok, results[rank] = pickle.loads(connection.recv_bytes())
                if not ok:
                    raise RuntimeError(f"rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(len(results))]

    def num_threads(self) -> int:
        return len(list(Path(f"/proc/{self._processes[0].pid}/task").iterdir()))

    def kill(self) -> None:
        _kill(self._processes)
        for connection in self._connections:
            connection.close()
        self._stack.close()


def _rank_main(connection: Connection, rank: int, environment: dict[str, str]) -> None:
    _end_with_the_caller()
    os.setsid()  # so that what a rank starts ends with it
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    from torch import distributed, set_num_threads

    from tests.pickling import dumps

    set_num_threads(1)
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    laid_out: Layout | None = None
    for call in itertools.count():
        try:
            function, layout, kwargs = connection.recv()
        except EOFError:
            return
        try:
            if layout != laid_out:
                _lay_out(layout, distributed.PrefixStore(str(call), store), again=laid_out is not None)
                laid_out = layout
            answer = dumps((True, _call(function, layout, kwargs)))
        except BaseException:
            answer = dumps((False, traceback.format_exc()))
        gc.collect()
        connection.send_bytes(answer)


def _end_with_the_caller() -> None:
    """However it ends: a stopped rank is woken when the fork server ends, and finds that nobody can call any more.

    That ends when nobody holds the other end of its pipe; it gives one to each process that it forks.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]


def _lay_out(layout: Layout, store: Any, *, again: bool) -> None:
    """Megatron's groups; those of the layout before are destroyed."""
    from megatron.core import parallel_state
    from torch import distributed

    if again:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
        gc.collect()  # their threads end
    distributed.init_process_group(
        "gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
    )


def _call(function: Callable[..., Any], layout: Layout, kwargs: dict[str, Any]) -> Any:
    from megatron.core import parallel_state, tensor_parallel

    if layout.vpp is not None:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    return function(**kwargs)
