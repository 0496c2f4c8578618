"""GPU use, memory, power and energy to TensorBoard, sampled by a thread that no step waits for.

    start(args)         one sampler a process; without NVML it says so in one line
    scalars(iteration)  what was sampled since the last time it was asked, over all ranks
    stop()              ends the thread

Readings come from NVML by `nvidia-ml-py`, or from any `GPUSource` that a program gives to `start`. A reading that hangs
stops the samples, never a step; the exchange between ranks is two small reductions a logged step.
"""

import logging
import os
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_longact.flags import add_groups

logger = logging.getLogger(__name__)

UTILIZATION = "gpu/utilization_percent"
UTILIZATION_LEAST = "gpu/utilization_percent_least"
MEMORY = "gpu/memory_gib_most"
POWER = "gpu/power_w"
ENERGY = "gpu/energy_per_iteration_j"
NAMES = (UTILIZATION, UTILIZATION_LEAST, MEMORY, POWER, ENERGY)


class Reading(NamedTuple):
    """One look at a GPU; None for what it does not tell."""

    utilization: float | None
    """Percent of the time that a kernel ran."""
    memory_bytes: float | None
    power_w: float | None
    energy_j: float | None
    """Of a counter that only rises."""


class GPUSource(Protocol):
    """Where readings of this process's GPU come from."""

    def read(self) -> Reading:
        """A reading; called by one thread alone, and may take its time."""

    def close(self) -> None:
        """The last call, by the same thread."""


class NoTelemetryError(Exception):
    """Why there is nothing to read, in one line."""


def visible_device(index: int, visible: str | None) -> int | str:
    """The NVML index or UUID of CUDA device `index`, given CUDA_VISIBLE_DEVICES.

    Raises `NoTelemetryError` for a MIG instance, and for a device that is not visible.
    """
    if visible is None:
        return index
    names = [name.strip() for name in visible.split(",")]
    if index >= len(names) or not names[index] or names[index].startswith("-"):
        raise NoTelemetryError(f"CUDA_VISIBLE_DEVICES={visible} has no device {index}")
    name = names[index]
    if name.startswith("MIG"):
        raise NoTelemetryError(f"{name} is a MIG instance, of which NVML tells no use, power or energy of its own")
    return int(name) if name.isdecimal() else name


class NvmlSource:
    """One GPU by NVML, through `pynvml` of nvidia-ml-py. NVML numbers GPUs as CUDA_DEVICE_ORDER=PCI_BUS_ID does."""

    def __init__(self, device: int | str) -> None:
        """device: NVML's index, or a UUID or the beginning of one; raises `NoTelemetryError`."""
        try:
            pynvml = import_module("pynvml")
        except ImportError as error:
            raise NoTelemetryError("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = self._find(device)
            mig = self._value("nvmlDeviceGetMigMode")
        except pynvml.NVMLError as error:
            raise NoTelemetryError(f"NVML: {error}") from error
        if mig is not None and mig[0]:
            raise NoTelemetryError(f"GPU {device} is divided by MIG; NVML tells no use, power or energy of a part")

    def _find(self, device: int | str) -> Any:
        if isinstance(device, int):
            return self._nvml.nvmlDeviceGetHandleByIndex(device)
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            if str(self._nvml.nvmlDeviceGetUUID(handle)).startswith(device):
                return handle
        raise NoTelemetryError(f"NVML knows no GPU {device}")

    def _value(self, name: str) -> Any | None:
        """What NVML answers, None where the GPU, the driver or the administrator does not let it."""
        nvml = self._nvml
        try:
            return getattr(nvml, name)(self._handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return None

    def read(self) -> Reading:
        """A reading; raises NVMLError when the GPU is lost."""
        utilization = self._value("nvmlDeviceGetUtilizationRates")
        memory = self._value("nvmlDeviceGetMemoryInfo")
        milliwatts = self._value("nvmlDeviceGetPowerUsage")
        millijoules = self._value("nvmlDeviceGetTotalEnergyConsumption")
        return Reading(
            None if utilization is None else float(utilization.gpu),
            None if memory is None else float(memory.used),
            None if milliwatts is None else milliwatts / 1000,
            None if millijoules is None else millijoules / 1000,
        )

    def close(self) -> None:
        """Let go of NVML."""
        self._nvml.nvmlShutdown()


@dataclass
class Window:
    """What was sampled since the last `Sampler.take`."""

    utilization: list[float] = field(default_factory=list)
    memory_bytes: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    energy_j: float | None = None


class Sampler:
    """A thread that reads a source now and then; `take` never waits for it."""

    def __init__(self, source: GPUSource, *, interval_s: float) -> None:
        self._source, self._interval = source, interval_s
        self._window = Window()
        self._lock = threading.Lock()  # held for additions alone, never during a reading
        self._last: tuple[float, Reading] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gpu-telemetry", daemon=True)
        self._thread.start()

    def take(self) -> Window:
        """The samples since the last call, none if there were none."""
        with self._lock:
            window, self._window = self._window, Window()
        return window

    def close(self, *, within_s: float = 2.0) -> bool:
        """End the thread; whether it has ended: one that hangs in a reading ends with the process."""
        self._stopped.set()
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _sample(self) -> None:
        try:
            while not self._stopped.is_set():
                reading = self._source.read()
                now = time.monotonic()
                with self._lock:
                    self._add(now, reading)
                self._stopped.wait(self._interval)
            self._source.close()
        except Exception as error:
            logger.warning("GPU telemetry stops: %s", " ".join(str(error).split()))

    def _add(self, now: float, reading: Reading) -> None:
        window = self._window
        for values, value in (
            (window.utilization, reading.utilization),
            (window.memory_bytes, reading.memory_bytes),
            (window.power_w, reading.power_w),
        ):
            if value is not None:
                values.append(value)
        if self._last is not None:
            energy = _energy_between(*self._last, now, reading)
            if energy is not None:
                window.energy_j = (window.energy_j or 0.0) + energy
        self._last = now, reading


def _energy_between(then: float, before: Reading, now: float, after: Reading) -> float | None:
    """Joules between two readings: of the counter, or else the mean power times the time."""
    if before.energy_j is not None and after.energy_j is not None:
        return after.energy_j - before.energy_j
    if before.power_w is not None and after.power_w is not None:
        return (before.power_w + after.power_w) / 2 * (now - then)
    return None


class Telemetry:
    """The samples of all ranks as scalars of an iteration."""

    def __init__(self, sampler: Sampler | None) -> None:
        """sampler: None on a rank that has nothing to read; it joins the exchange all the same."""
        self._sampler = sampler
        self._scalars: dict[str, float | None] = {}
        self._reported: int | None = None
        self._energy_since: int | None = None  # the first report has model building and loading in it
        self._nobody_samples = False

    def scalars(self, iteration: int) -> dict[str, float | None]:
        """`NAMES` since the iteration before that was asked about; collective, and the same on all ranks.

        None is what nobody could tell, and nothing is what nobody ever will. Asked again for the same iteration, the
        answer is the same.
        """
        if iteration != self._reported and not self._nobody_samples:
            self._scalars = self._exchange(iteration)
            self._reported = iteration
        return self._scalars

    def _exchange(self, iteration: int) -> dict[str, float | None]:
        window = Window() if self._sampler is None else self._sampler.take()
        sums = [_mean_and_one(window.utilization), _mean_and_one(window.power_w)]
        energy = (0.0, 0.0) if window.energy_j is None else (window.energy_j, 1.0)
        summed = _over_ranks([*sums[0], *sums[1], *energy, float(self._sampler is not None)], largest=False)
        idle = -min(window.utilization, default=_NOTHING)
        largest = _over_ranks([idle, max(window.memory_bytes, default=-1.0)], largest=True)
        self._nobody_samples = summed[6] == 0
        if self._nobody_samples:
            return {}
        return {
            UTILIZATION: summed[0] / summed[1] if summed[1] else None,
            UTILIZATION_LEAST: -largest[0] if largest[0] > -_NOTHING else None,
            MEMORY: largest[1] / 2**30 if largest[1] >= 0 else None,
            POWER: summed[2] / summed[3] if summed[3] else None,
            ENERGY: self._energy(summed[4], known=summed[5] > 0, iteration=iteration),
        }

    def _energy(self, joules: float, *, known: bool, iteration: int) -> float | None:
        """Joules of all GPUs an iteration, since the last one that had any; before the first there is the start."""
        if not known:
            return None
        since, self._energy_since = self._energy_since, iteration
        return None if since is None else joules / (iteration - since)

    def close(self) -> bool:
        """End the thread, if there is one; whether none is left."""
        return self._sampler is None or self._sampler.close()


_NOTHING = 1e9
"""Larger than any utilization."""


def _mean_and_one(values: Sequence[float]) -> tuple[float, float]:
    return (sum(values) / len(values), 1.0) if values else (0.0, 0.0)


def _over_ranks(values: list[float], *, largest: bool) -> list[float]:
    if not dist.is_initialized():
        return values
    on_device = torch.tensor(values, dtype=torch.float64).cuda()
    dist.all_reduce(on_device, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    reduced: list[float] = on_device.tolist()
    return reduced


# -- one a process ---------------------------------------------------------------------------------

_running: Telemetry | None = None


@dataclass(frozen=True, kw_only=True)
class TelemetryFlags:
    """The flags, named as Megatron names its own."""

    log_gpu_telemetry_to_tensorboard: bool = False
    """Write use, memory, power and energy of the GPUs to TensorBoard, read by NVML (nvidia-ml-py)."""
    gpu_telemetry_interval: float = 0.5
    """Seconds between two readings."""


def add_telemetry_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    return add_groups(parser, {"gpu telemetry": TelemetryFlags})


def check_telemetry_args(args: Namespace) -> None:
    """Raise `ValueError` for an interval that makes no sense."""
    interval = args.gpu_telemetry_interval
    if not 0 < interval < float("inf"):
        raise ValueError(f"--gpu-telemetry-interval is {interval}; it must be a positive number of seconds")


def start(
    *, interval_s: float = 0.5, source: GPUSource | None = None, environment: Mapping[str, str] | None = None
) -> Telemetry:
    """Begin to sample this process's GPU, once: what runs already goes on, with its own source and interval.

    source: where readings come from; None: NVML. Where that has nothing to read one line says why, on the first
    rank of a node, and no thread is started; the `Telemetry` that is returned then has no scalars.
    environment: whose CUDA_VISIBLE_DEVICES counts; None: this process's.
    """
    global _running
    if _running is None:
        try:
            source = source or _nvml(os.environ if environment is None else environment)
        except NoTelemetryError as reason:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("GPU telemetry is off: %s", " ".join(str(reason).split()))
        _running = Telemetry(None if source is None else Sampler(source, interval_s=interval_s))
    return _running


def _nvml(environment: Mapping[str, str]) -> GPUSource:
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return NvmlSource(visible_device(index, environment.get("CUDA_VISIBLE_DEVICES")))


def scalars(iteration: int) -> dict[str, float | None]:
    """`Telemetry.scalars` of what `start` began, nothing if nothing did; collective."""
    return {} if _running is None else _running.scalars(iteration)


def stop() -> None:
    """End it; may be called twice."""
    global _running
    ended, _running = _running, None
    if ended is not None:
        ended.close()
