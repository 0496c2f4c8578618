"""LongAct inside SkyRL: its own Megatron policy worker trains, saves and resumes, on two ranks without a GPU.

In an environment of its own: make test-trainer NAME=skyrl. The worker is the class that SkyRL's Ray actors are made of,
with all of its own methods; `skyrl_in_cpu_mode.py` says what stands in for what. Ray's actors around it, inference
engines and rollouts are not run.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from megatron_longact.commands import compat
from tests import ranks
from tests.conversion import make_hf
from tests.ranks import Layout
from tests.test_checkpoints import assert_bitwise
from tests.tokenizers import save_hugging_face_tokenizer

if find_spec("skyrl") is None:
    pytest.skip("NOT RUN: SkyRL is not here; make test-trainer NAME=skyrl", allow_module_level=True)

from tests.trainers import skyrl_run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks, tensor and sequence parallel."""
    ranks._CONTEXT.set_forkserver_preload(["tests.trainers.skyrl_in_cpu_mode"])
    folder = tmp_path_factory.mktemp("skyrl")
    sizes = {"vocab_size": skyrl_run.VOCABULARY, "hidden_size": 64, "max_position_embeddings": 256}
    make_hf("qwen3", folder / "model", dtype=torch.bfloat16, shard_size="1GB", **sizes)
    save_hugging_face_tokenizer(folder / "model")
    return ranks.run(skyrl_run.run, layout=Layout(tp=2), world_size=2, folder=folder, timeout=250)


def test_frozen_rows_are_bitwise_in_what_skyrl_sends(results: list[dict[str, Any]]) -> None:
    for result in results:
        exported = result["exported"]
        for before, after, state in zip(exported, exported[1:], result["states"], strict=False):
            for part, layers in state["masks"].items():
                for layer, mask in enumerate(layers):
                    name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                    assert torch.equal((before[name] != after[name]).any(1), mask)
            assert (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any()
        assert min(result["norms"]) > 0


def test_the_selection_is_that_of_all_calls_of_a_step(results: list[dict[str, Any]]) -> None:
    """And of prompts and responses, without padding: each token once, whatever was recomputed or only looked at."""
    real = int(skyrl_run.batch(0)["attention_mask"].sum())
    for result in results:
        first, once = result["states"][0], result["once"]
        assert_bitwise(first["masks"], once["state"]["masks"])
        assert_bitwise(first["saliency"], once["state"]["saliency"])
        assert not torch.equal(first["masks"]["q"], once["half"]["masks"]["q"])
        assert all(tokens.eq(real).all() for tokens in result["tokens"])


def test_a_resumed_worker_goes_on_bitwise(results: list[dict[str, Any]]) -> None:
    for result in results:
        resumed = result["resumed"]
        assert_bitwise(resumed["loaded"], result["states"][0])
        assert_bitwise(resumed["state"], result["states"][1])
        assert_bitwise(resumed["weights"], result["exported"][2])


def test_compat_says_that_it_attaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main(["--trainer", "skyrl"]) == 0
    assert "trainer.override_entrypoint=skyrl_worker" in capsys.readouterr().out
