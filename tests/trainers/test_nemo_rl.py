"""LongAct inside NeMo-RL: its own Megatron policy worker trains, saves and resumes, on two ranks without a GPU.

    NEMO_RL=path/to/RL make test-trainer NAME=nemo_rl

The checkout has its submodule Megatron-Bridge, and that one Megatron-LM. The worker is the class that NeMo-RL's Ray
actors are made of, with all of its own methods; `nemo_rl_in_cpu_mode.py` says what stands in for what. Ray's actors
around it, inference engines and rollouts are not run.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.conversion import make_hf
from tests.launch import ROOT
from tests.ranks import Layout
from tests.test_checkpoints import assert_bitwise
from tests.tokenizers import save_hugging_face_tokenizer
from tests.trainers import nemo_rl_run

NEMO_RL = os.environ.get("NEMO_RL", "")
BRIDGE = Path(NEMO_RL, "3rdparty/Megatron-Bridge-workspace/Megatron-Bridge")
THERE = bool(NEMO_RL) and Path(BRIDGE, "3rdparty/Megatron-LM/megatron/core").is_dir() and find_spec("ray")
pytestmark = [
    pytest.mark.skipif(not THERE, reason="NOT RUN: NEMO_RL=path/to/RL make test-trainer NAME=nemo_rl"),
    pytest.mark.timeout(300),
]
if THERE:
    folders = [ROOT, BRIDGE / "src", BRIDGE / "3rdparty/Megatron-LM", NEMO_RL]
    os.environ["PYTHONPATH"] = ":".join(map(str, folders))  # of the fork server, which is not told sys.path
    ranks._CONTEXT.set_forkserver_preload(["tests.trainers.nemo_rl_in_cpu_mode"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a Hugging Face model in `model`, and what the runs leave."""
    folder = tmp_path_factory.mktemp("nemo_rl")
    sizes = {"vocab_size": nemo_rl_run.VOCABULARY, "hidden_size": 64, "max_position_embeddings": 256}
    make_hf("qwen3", folder / "model", dtype=torch.bfloat16, shard_size="1GB", **sizes)
    save_hugging_face_tokenizer(folder / "model")
    return folder


def on_two_ranks(function: Any, folder: Path) -> list[dict[str, Any]]:
    """Tensor and sequence parallel; in processes of their own, because Megatron-Bridge sets up a process once."""
    ranks.close()
    return ranks.run(function, layout=Layout(tp=2), world_size=2, folder=folder, timeout=140)


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return on_two_ranks(nemo_rl_run.run, folder)


def test_frozen_rows_are_bitwise_in_what_nemo_rl_sends(results: list[dict[str, Any]]) -> None:
    """By `train` and streamed; of all calls of a step, each token of a sequence once, and no padding."""
    for result in results:
        exported = result["exported"]
        for update, state in enumerate(result["states"]):
            before, after = exported[update : update + 2]
            for part, layers in state["masks"].items():
                for layer, mask in enumerate(layers):
                    name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
                    assert torch.equal((before[name] != after[name]).any(1), mask)
            assert (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any()
            lengths = [9 + (5 * i + update) % 15 for i in range(nemo_rl_run.SEQUENCES)]
            assert result["tokens"][update].eq(sum(lengths)).all()
        assert min(result["norms"]) > 0


def test_a_resumed_worker_goes_on_bitwise(results: list[dict[str, Any]], folder: Path) -> None:
    for result, resumed in zip(results, on_two_ranks(nemo_rl_run.resume, folder), strict=True):
        assert_bitwise(resumed["loaded"], result["states"][0])
        assert_bitwise(resumed["started"], result["exported"][1])
        assert_bitwise(resumed["state"], result["states"][1])
        assert_bitwise(resumed["weights"], result["exported"][2])
