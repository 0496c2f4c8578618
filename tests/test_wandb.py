"""Weights & Biases gets what TensorBoard gets, by the real package, offline; skipped where it is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_train_grpo import train

wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
pytestmark = pytest.mark.timeout(300)


def logged(folder: Path) -> dict[str, dict[int, Any]]:
    """By name and step, out of the file that an offline run writes."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    [path] = folder.glob("offline-run-*/run-*.wandb")
    store, found = DataStore(), dict[str, dict[int, Any]]()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            if not name.startswith("_"):
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
