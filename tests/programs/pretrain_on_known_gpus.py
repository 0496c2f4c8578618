"""`pretrain_plain.py` on GPUs whose readings are known: the rank says what they are."""

import os
import runpy
import time
from pathlib import Path

from megatron_longact.megatron import telemetry

RANK = int(os.environ["RANK"])


class KnownGpu:
    """Rank r: 40 + 20 r percent, r + 1 GiB, 100 (r + 1) W, and a counter that agrees."""

    def read(self) -> telemetry.Reading:
        watts = 100.0 * (RANK + 1)
        return telemetry.Reading(40.0 + 20 * RANK, (RANK + 1) * 2.0**30, watts, watts * time.monotonic())

    def close(self) -> None:
        print(f"rank {RANK} closed its source", flush=True)


if __name__ == "__main__":
    telemetry.start(source=KnownGpu(), interval_s=0.002)
    runpy.run_path(str(Path(__file__).with_name("pretrain_plain.py")), run_name="__main__")
