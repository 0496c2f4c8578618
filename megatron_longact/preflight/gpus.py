"""GPUs of a node, by torch and, where nvidia-ml-py is installed, by NVML."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from megatron_longact.preflight.checks import NotHereError

GIB = 1 << 30
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free: less means that another program is on it."""


def gpus(*, wanted: int, kind: str, min_memory_gib: float) -> str:
    """So many GPUs of one kind (a part of its name) and size on this node."""
    count = torch.cuda.device_count()
    if count == 0:
        raise NotHereError("no GPU is visible")
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    names = sorted({p.name for p in properties})
    memory = min(p.total_memory for p in properties) / GIB
    if count < wanted:
        raise ValueError(f"{count} GPUs are visible, {wanted} ranks are on this node")
    if not all(kind.lower() in name.lower() for name in names):
        raise ValueError(f"the GPUs are {', '.join(names)}; {kind} was asked for")
    if memory < min_memory_gib:
        raise ValueError(f"a GPU has {memory:.1f} GiB, {min_memory_gib:g} were asked for")
    return f"{count} x {', '.join(names)}, {memory:.1f} GiB"


def memory(local_rank: int) -> str:
    """Nobody else is on this rank's GPU."""
    _need_gpu(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    if free < FREE_SHARE * total:
        raise ValueError(f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free: another program is on this GPU")
    return f"more than {FREE_SHARE:.0%} free"


def health(local_rank: int) -> str:
    """No uncorrected memory error since the driver was loaded, and no row that waits for being remapped."""
    _need_gpu(local_rank)
    with _nvml() as nvml:
        device = _device(nvml, local_rank)
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(device)
    if errors or pending or failed:
        wrong = f"{errors} uncorrected memory errors, row remapping pending {pending}, failed {failed}"
        raise ValueError(f"{wrong}: the GPU needs a reset, or an exchange")
    return "no uncorrected memory errors, no row to remap"


def nvlink(local_rank: int) -> str:
    """All NVLinks of this rank's GPU are up."""
    _need_gpu(local_rank)
    if torch.cuda.device_count() == 1:
        raise NotHereError("one GPU on this node")
    with _nvml() as nvml:
        states = list(_links(nvml, _device(nvml, local_rank)))
    if not states:
        raise NotHereError("this GPU has no NVLink")
    if not all(states):
        raise ValueError(f"{states.count(False)} of {len(states)} NVLinks are down")
    return f"{len(states)} links up"


def _need_gpu(local_rank: int) -> None:
    if torch.cuda.device_count() <= local_rank:
        raise NotHereError("no GPU is visible for this rank")


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        raise NotHereError("needs nvidia-ml-py (pip install nvidia-ml-py)") from None
    names = ("NotSupported", "NotFound", "NoPermission", "LibraryNotFound", "DriverNotLoaded")
    unable = tuple(getattr(pynvml, f"NVMLError_{name}") for name in names)
    try:
        pynvml.nvmlInit()
        yield pynvml
        pynvml.nvmlShutdown()
    except unable as error:  # a slice of a GPU, or a container without the library; anything else is a fault
        raise NotHereError(f"NVML cannot say: {error}") from error


def _device(nvml: Any, local_rank: int) -> Any:
    # NVML counts all GPUs, torch the visible ones
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(local_rank).uuid}".encode())


def _links(nvml: Any, device: Any) -> Iterator[bool]:
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            yield nvml.nvmlDeviceGetNvLinkState(device, link) == nvml.NVML_FEATURE_ENABLED
        except nvml.NVMLError:  # the device has no more links
            return
