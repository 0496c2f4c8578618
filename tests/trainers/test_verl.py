"""LongAct inside verl: its own Megatron engine trains, saves and resumes, attached by `model.external_lib`.

In an environment of its own: make test-trainer NAME=verl.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.commands import compat
from tests import ranks
from tests.integrations import tensors_equal
from tests.ranks import Layout

if find_spec("verl") is None:
    pytest.skip("NOT RUN: verl is not here; make test-trainer NAME=verl", allow_module_level=True)

from tests.trainers import verl_run

pytestmark = pytest.mark.timeout(500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model and its checkpoint, once it has run."""
    return tmp_path_factory.mktemp("verl")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """Of two ranks, tensor and sequence parallel."""
    ranks._CONTEXT.set_forkserver_preload(["tests.trainers.verl_in_cpu_mode"])
    return ranks.run(verl_run.run, layout=Layout(tp=2), world_size=2, folder=folder, timeout=400)


def name_of(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}_proj.weight"


def test_frozen_rows_are_bitwise_in_what_verl_sends(results: list[dict[str, Any]]) -> None:
    for result in results:
        exported = result["exported"]
        for before, after, masks in zip(exported, exported[1:], result["masks"], strict=False):
            for part, layers in masks.items():
                for layer, mask in enumerate(layers):
                    changed = (before[name_of(layer, part)] != after[name_of(layer, part)]).any(1)
                    assert torch.equal(changed, mask)
            assert (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any()
        first, last = result["masks"][0], result["masks"][-1]
        assert not tensors_equal(first, last)


def test_rows_named_as_frozen_are_in_no_delta_of_verl(results: list[dict[str, Any]]) -> None:
    """And every other row of Q and K is: each rank's delta has its own part of them."""
    for since, named in enumerate(results[0]["frozen"]):
        for name, rows in named.items():
            sent = {row for result in results for one in result["deltas"][since:] for row in one.get(name, [])}
            assert set(rows.tolist()) == set(range(len(results[0]["exported"][0][name]))) - sent
            assert sent


def test_a_resumed_engine_goes_on_with_the_mask(results: list[dict[str, Any]]) -> None:
    for result in results:
        loaded = result["loaded"]["state"]
        assert loaded["updates"] == 2
        assert tensors_equal(loaded["masks"], result["masks"][1])
        assert tensors_equal(result["loaded"]["weights"], result["exported"][2])
        assert tensors_equal(result["resumed"]["state"], result["state"])
        assert tensors_equal(result["resumed"]["weights"], result["exported"][3])
    assert max(results[0]["norms"] + results[1]["norms"]) > 0


def test_a_critic_is_left_alone(results: list[dict[str, Any]], folder: Path) -> None:
    assert ranks.run(verl_run.critic, layout=Layout(tp=2), world_size=2, folder=folder) == [True, True]


def test_compat_says_that_it_attaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main(["--trainer", "verl"]) == 0
    assert "actor_rollout_ref.model.external_lib=verl_engine" in capsys.readouterr().out
