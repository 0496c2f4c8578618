"""Ranks that find each other, and how fast they add up a tensor."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer

import torch
import torch.distributed as dist

from megatron_longact.preflight.checks import Measured, NotHereError, TooLittleError

ROUNDS = 5


@contextmanager
def deadline(seconds: float, *, waits_for: str) -> Iterator[None]:
    """End the process with one line if the block takes longer: a collective that hangs cannot be stopped otherwise."""

    def end() -> None:
        print(f"preflight: {waits_for}: nothing for {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def meet(*, rank: int, world_size: int, timeout_s: float) -> None:
    """A process group over gloo of all ranks; to be called within a `deadline` of `timeout_s`, which speaks first."""
    store = None if world_size > 1 else dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=2 * timeout_s)
    )


def all_reduce(*, mib: int, min_gb_s: float, local_rank: int) -> tuple[str, Measured]:
    """Bus bandwidth, 2 (n - 1) / n of a tensor's bytes over the time of its sum: NCCL on GPUs, gloo without.

    Called by all ranks, all of which have GPUs or none.
    """
    n = dist.get_world_size()
    if n == 1:
        raise NotHereError("one rank")
    on_gpu = torch.cuda.device_count() > local_rank
    if on_gpu:
        torch.cuda.set_device(local_rank)
    group = dist.new_group(backend="nccl") if on_gpu else dist.group.WORLD
    tensor = torch.ones(mib * 2**20 // 4, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(tensor, group=group)
    if tensor[0] != n or tensor[-1] != n:
        raise ValueError(f"the sum of {n} ones is {tensor[0].item():g}, {tensor[-1].item():g}")
    seconds = _time_of(tensor.zero_(), group)
    speed = 2 * (n - 1) / n * tensor.nbytes / seconds / 1e9
    if speed < min_gb_s:
        raise TooLittleError(f"less than {min_gb_s:g} GB/s", Measured(speed, "GB/s"))
    return f"{'NCCL' if on_gpu else 'gloo'}, {mib} MiB on {n} ranks", Measured(speed, "GB/s")


def _time_of(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Seconds of one sum, a mean of several."""
    _wait(tensor)
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor, group=group)
    _wait(tensor)
    return (time.perf_counter() - begun) / ROUNDS


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
