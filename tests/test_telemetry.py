"""GPU telemetry: what a thread samples, what ranks write to TensorBoard, and that no step waits for it."""

import argparse
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_longact.megatron import telemetry
from megatron_longact.megatron.telemetry import NoTelemetryError, Reading, Sampler, Telemetry, visible_device
from tests import ranks
from tests.test_run import PROGRAMS, TRAINING, losses

pytestmark = pytest.mark.timeout(300)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "gpu-telemetry"]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    telemetry.stop()
    assert not threads()


class Listed:
    """A GPU that gives these readings, one after the other, and the last one for ever."""

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)
        self.read_all = threading.Event()
        self.closed = False

    def read(self) -> Reading:
        if len(self.readings) > 1:
            return self.readings.pop(0)
        self.read_all.set()
        return self.readings[0]

    def close(self) -> None:
        self.closed = True


class Hanging(Listed):
    """Reads once, and then hangs until it is let go."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.hangs, self.let_go = threading.Event(), threading.Event()

    def read(self) -> Reading:
        if self.read_all.is_set():
            self.hangs.set()
            self.let_go.wait(60)
        return super().read()


def sampled(*readings: Reading) -> telemetry.Window:
    """What a sampler has of these readings, the last of which may be there several times."""
    source = Listed(*readings)
    sampler = Sampler(source, interval_s=0.001)
    assert source.read_all.wait(20)
    time.sleep(0.02)
    window = sampler.take()
    assert sampler.close()
    assert source.closed
    assert not threads()
    return window


def test_samples_are_the_readings() -> None:
    window = sampled(Reading(10.0, 5.0, 100.0, 1000.0), Reading(30.0, 7.0, 200.0, 1250.0))
    assert window.utilization[:2] == [10.0, 30.0]
    assert window.memory_bytes[:2] == [5.0, 7.0]
    assert window.power_w[:2] == [100.0, 200.0]
    assert window.energy_j == 250.0  # of the counter, not the integral of the power


def test_energy_is_power_times_time_where_there_is_no_counter() -> None:
    source = Listed(Reading(None, None, 500.0, None))
    begun = time.monotonic()
    sampler = Sampler(source, interval_s=0.01)
    time.sleep(0.3)
    window, seconds = sampler.take(), time.monotonic() - begun
    assert sampler.close()
    assert window.energy_j is not None
    assert 500.0 * 0.1 < window.energy_j <= 500.0 * seconds
    assert window.utilization == window.memory_bytes == []


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    window = sampled(Reading(None, None, None, None), Reading(None, None, None, None))
    assert window == telemetry.Window()


def test_energy_of_windows_adds_up() -> None:
    source = Listed(*(Reading(None, None, None, float(n * n)) for n in range(100)))
    sampler, joules = Sampler(source, interval_s=0.001), 0.0
    while not source.read_all.is_set():
        joules += sampler.take().energy_j or 0.0
    time.sleep(0.02)
    joules += sampler.take().energy_j or 0.0
    assert sampler.close()
    assert joules == 99.0**2


def test_a_reading_that_hangs_holds_nobody_up() -> None:
    source = Hanging(Reading(50.0, 1.0, 100.0, 0.0))
    sampler = Sampler(source, interval_s=0.001)
    report = Telemetry(sampler)
    assert source.hangs.wait(20)
    begun = time.monotonic()
    assert report.scalars(1)[telemetry.UTILIZATION] == 50.0
    for iteration in range(2, 1000):
        assert report.scalars(iteration)[telemetry.UTILIZATION] is None
    assert not sampler.close(within_s=0.1)
    assert time.monotonic() - begun < 5  # an hour, if one of them waited
    source.let_go.set()
    assert sampler.close(within_s=20)


def test_a_gpu_that_is_lost_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Lost(Listed):
        def read(self) -> Reading:
            raise RuntimeError("GPU is lost\nreboot")

    with caplog.at_level(logging.WARNING):
        sampler = Sampler(Lost(Reading(None, None, None, None)), interval_s=0.001)
        sampler._thread.join(20)
    assert [record.getMessage() for record in caplog.records] == ["GPU telemetry stops: GPU is lost reboot"]
    assert sampler.take() == telemetry.Window()
    assert sampler.close()


@pytest.mark.parametrize(
    ("index", "visible", "wanted"),
    [
        (1, None, 1),
        (1, "4,5", 5),
        (0, " 7 ", 7),
        (1, "0,GPU-8932f937-d72c", "GPU-8932f937-d72c"),
        (0, "GPU-8932", "GPU-8932"),
    ],
)
def test_device_that_cuda_sees(index: int, visible: str | None, wanted: int | str) -> None:
    assert visible_device(index, visible) == wanted


@pytest.mark.parametrize(
    ("index", "visible", "line"),
    [
        (0, "MIG-GPU-8932f937/1/0", "is a MIG instance"),
        (0, "MIG-4b1cd1f5", "is a MIG instance"),
        (0, "", "has no device 0"),
        (2, "0,1", "has no device 2"),
        (1, "0,-1", "has no device 1"),
    ],
)
def test_no_device_is_said_in_one_line(index: int, visible: str, line: str) -> None:
    with pytest.raises(NoTelemetryError, match=line):
        visible_device(index, visible)


def start_and_report() -> dict[str, Any]:
    """On a rank: what the flag does, and what it leaves."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_longact").addHandler(handler)
    running = telemetry.start(environment={"CUDA_VISIBLE_DEVICES": "MIG-4b1cd1f5"})
    assert telemetry.start() is running
    scalars = [telemetry.scalars(iteration) for iteration in (1, 1, 2)]
    found = threads()
    telemetry.stop()
    logging.getLogger("megatron_longact").removeHandler(handler)
    return {"lines": lines, "scalars": scalars, "threads": found, "after": telemetry.scalars(3)}


def test_nothing_to_read_is_one_line_and_no_thread() -> None:
    results = ranks.run(start_and_report, world_size=2)
    [line] = [line for result in results for line in result["lines"]]
    assert line.startswith("GPU telemetry is off: MIG-4b1cd1f5 is a MIG instance")
    for result in results:
        assert result["scalars"] == [{}, {}, {}]
        assert result["threads"] == []
        assert result["after"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has NVML")
def test_absent_nvml_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        telemetry.start(environment={})
    [record] = caplog.records
    assert record.getMessage().startswith("GPU telemetry is off: ")
    assert "\n" not in record.getMessage()
    assert not threads()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU")
def test_a_real_gpu_tells() -> None:
    source = telemetry.NvmlSource(visible_device(0, None))
    before = source.read()
    torch.ones(2**26, device="cuda").sum().item()
    time.sleep(0.5)
    after = source.read()
    source.close()
    assert after.memory_bytes is not None
    assert after.memory_bytes >= 2**28
    assert after.power_w is not None
    assert after.power_w > 10
    assert before.energy_j is not None
    assert after.energy_j is not None
    assert 0 < after.energy_j - before.energy_j < 1000


@pytest.mark.parametrize("interval", ["0", "-1", "inf", "nan"])
def test_an_interval_that_makes_no_sense(interval: str) -> None:
    args = telemetry.add_telemetry_args(argparse.ArgumentParser()).parse_args([f"--gpu-telemetry-interval={interval}"])
    with pytest.raises(ValueError, match="--gpu-telemetry-interval is"):
        telemetry.check_telemetry_args(args)


def test_known_gpus_in_tensorboard(tmp_path: Path) -> None:
    flags = ["--tensor-model-parallel-size", "2", "--train-iters", "6", "--log-gpu-telemetry-to-tensorboard"]
    flags += ["--tensorboard-dir", str(tmp_path), "--tensorboard-queue-size", "1"]
    program = str(PROGRAMS / "pretrain_on_known_gpus.py")
    result = ranks.run_program(program, *TRAINING, *flags, world_size=2)
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 6
    assert result.stdout.count("closed its source") == 2
    events = EventAccumulator(str(tmp_path)).Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in telemetry.NAMES}
    assert set(values[telemetry.UTILIZATION]) == {50.0}
    assert set(values[telemetry.UTILIZATION_LEAST]) == {40.0}
    assert set(values[telemetry.MEMORY]) == {2.0}
    assert set(values[telemetry.POWER]) == {150.0}
    energies = events.Scalars(telemetry.ENERGY)
    assert [event.step for event in events.Scalars(telemetry.POWER)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in energies] == [2, 3, 4, 5, 6]
    seconds = energies[-1].wall_time - events.Scalars(telemetry.POWER)[0].wall_time
    assert sum(event.value for event in energies) == pytest.approx(300.0 * seconds, rel=0.2)
