"""Weights & Biases gets what TensorBoard gets, by the real package, offline; skipped where it is not installed."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_train_grpo import train

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
pytestmark = pytest.mark.timeout(300)

BLOCK, HEADER, WHOLE, LAST = 32768, struct.Struct("<IHB"), 1, 4  # checksum, length, kind


def records(path: Path) -> Iterator[bytes]:
    """Those of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind seven bytes of W&B's own."""
    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:  # what a block ends with
            place += left
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size + length
        parts += data[place - length : place]
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""


def logged(folder: Path) -> dict[str, dict[int, Any]]:
    """By name and step, out of the file that an offline run writes."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("offline-run-*/run-*.wandb")
    found: dict[str, dict[int, Any]] = {}
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = record.history.item
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        for name, value in row.items():
            found.setdefault(name, {})[row["_step"]] = value
    return found


def test_wandb_gets_every_scalar_that_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = train(tmp_path / "my-run", "--longact", "--train-iters", "2", "--wandb-project", "longact")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "my-run/tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.endswith("vs samples")]  # Megatron's, by samples
    found = logged(tmp_path / "my-run/wandb")
    assert {"reward_mean", "longact/mask_jaccard", "heldout/accuracy@80", "learning-rate"} <= {*names} <= {*found}
    for name in names:
        wanted = {event.step: event.value for event in events.Scalars(name)}
        assert found[name] == pytest.approx(wanted, rel=1e-6), name
