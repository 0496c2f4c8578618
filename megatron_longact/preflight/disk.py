"""The folder that checkpoints go to."""

import os
import shutil
import time
from pathlib import Path

from megatron_longact.preflight.checks import Measured, TooLittleError

BLOCK = 4 << 20


def space(folder: Path, *, min_free_gb: float) -> tuple[str, Measured]:
    """Enough free space."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < min_free_gb:
        raise TooLittleError(f"less than {min_free_gb:g} GB free in {folder}", Measured(free, "GB"))
    return f"free in {folder}", Measured(free, "GB")


def write_speed(folder: Path, *, rank: int, mib: int, min_mb_s: float) -> tuple[str, Measured]:
    """Writing a file of `mib` MiB to the end of fsync; all ranks do so at once, as in a save."""
    folder.mkdir(parents=True, exist_ok=True)
    path, block = folder / f".preflight-{rank}-{os.getpid()}", os.urandom(BLOCK)
    begun = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(-(-mib * 2**20 // BLOCK)):
                file.write(block)
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begun
    finally:
        path.unlink(missing_ok=True)
    speed = mib * 2**20 / seconds / 1e6
    if speed < min_mb_s:
        raise TooLittleError(f"less than {min_mb_s:g} MB/s into {folder}", Measured(speed, "MB/s"))
    return "a rank", Measured(speed, "MB/s")
