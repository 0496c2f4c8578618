"""LongAct inside slime: its own arguments, model, training steps and checkpoints, on two ranks without a GPU.

    SLIME=path/to/slime make test-trainer NAME=slime

`slime_on_cpu.py` says what stands in for what. The hooks are those of `examples/integrations/slime_hooks.py`, attached
by slime's own flags; the start is a Hugging Face folder that our converter made a checkpoint of, given by `--ref-load`.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from megatron_longact.conversion import to_megatron
from megatron_longact.qkv_layout import QKVLayout
from tests.conversion import make_hf
from tests.launch import QUIET, ROOT, on_ranks
from tests.launch import run as run_command
from tests.test_checkpoints import assert_bitwise, longact_of, read
from tests.tokenizers import save_hugging_face_tokenizer

SLIME = os.environ.get("SLIME", "")
THERE = bool(SLIME) and Path(SLIME, "slime/backends/megatron_utils").is_dir() and importlib.util.find_spec("ray")
pytestmark = [
    pytest.mark.skipif(not THERE, reason="NOT RUN: SLIME=path/to/slime make test-trainer NAME=slime"),
    pytest.mark.timeout(500),
]
LAYERS, LAYOUT = 2, QKVLayout(num_attention_heads=4, num_query_groups=2, kv_channels=16)
WEIGHT = "decoder.layers.self_attention.linear_qkv.weight"
SETTINGS = "longact_ratio: 0.25\nlongact_ema: 0.5\nlongact_refresh_interval: 4\n"
FLAGS = """
    --tensor-model-parallel-size 2 --sequence-parallel --num-layers 2 --hidden-size 64 --ffn-hidden-size 48
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm --swiglu
    --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --position-embedding-type rope
    --rotary-base 1000000 --untie-embeddings-and-output-weights --vocab-size 320 --make-vocab-size-divisible-by 1
    --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --lr-decay-style constant --weight-decay 0.1
    --actor-num-nodes 1 --actor-num-gpus-per-node 2 --rollout-num-gpus 0 --advantage-estimator grpo
    --num-rollout 4 --rollout-batch-size 2 --n-samples-per-prompt 4 --global-batch-size 4 --micro-batch-size 1
    --save-interval 1 --custom-megatron-init-path slime_hooks.check_settings
    --custom-megatron-before-train-step-hook-path slime_hooks.before_train_step
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face model, what our converter made of it, and LongAct's settings."""
    folder = tmp_path_factory.mktemp("start")
    sizes = {"vocab_size": 320, "hidden_size": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-6}
    make_hf("qwen3", folder / "hf", dtype=torch.bfloat16, shard_size="1GB", **sizes)
    save_hugging_face_tokenizer(folder / "hf")
    to_megatron.convert(folder / "hf", folder / "megatron")
    (folder / "longact.yaml").write_text(SETTINGS)
    return folder


def train(start: Path, load: Path, folder: Path, *more: str) -> None:
    """Train the rollouts up to the second, two steps each, from what lies in `load`; a checkpoint of each."""
    path = [str(ROOT), str(ROOT / "examples/integrations"), SLIME, os.environ.get("PYTHONPATH", "")]
    given = ["--hf-checkpoint", str(start / "hf"), "--ref-load", str(start / "megatron"), "--load", str(load)]
    given += ["--save", str(folder), "--custom-config-path", str(start / "longact.yaml"), *more]
    done = run_command(
        on_ranks(2, str(Path(__file__).parent / "slime_on_cpu.py"), "3", *FLAGS.split(), *given),
        timeout=240,
        environment={**QUIET, "PYTHONPATH": ":".join(filter(None, path))},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_slime_freezes_and_goes_on_bitwise(start: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(start, straight, straight, "--start-rollout-id", "1")  # Megatron takes no checkpoint of iteration 0
    before, state = longact_of(straight, 1), longact_of(straight, 2)
    assert (before["updates"], state["updates"], state["refreshes"]) == (2, 4, 1)
    assert_bitwise(state["masks"], before["masks"])
    (_, old), (_, new) = (read(straight, rollout) for rollout in (1, 2))
    for layer in range(LAYERS):
        trained = LAYOUT.fused(state["masks"]["q"][layer], state["masks"]["k"][layer], fill=True)
        assert 0.4 < trained.float().mean() < 0.5  # 25 % of Q and K, all of V
        assert torch.equal((old[WEIGHT][layer] != new[WEIGHT][layer]).any(1), trained)

    (straight / "latest_checkpointed_iteration.txt").write_text("1")
    train(start, straight, resumed)
    assert_bitwise(longact_of(resumed, 2), state)
    assert torch.equal(read(resumed, 2)[1][WEIGHT], new[WEIGHT])
