"""LongAct inside ms-swift: its own command line, its trainers and mcore-bridge's models, on two ranks without a GPU.

    make test-trainer NAME=swift

`megatron sft` and `megatron rlhf --rlhf_type grpo` with `--external_plugins` and `--callbacks`, from a Hugging Face
folder, tensor and sequence parallel, bf16, distributed optimizer. ms-swift builds Transformer Engine's modules: they
are the real ones, with torch in place of their kernels (`tests/te/torch_kernels.py`). Of GRPO only vLLM is not there:
`swift_ready_made.py` says what stands in for it.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.qkv_layout import QKVLayout
from tests import ranks
from tests.conversion import make_hf
from tests.test_checkpoints import assert_bitwise, longact_of, read
from tests.tokenizers import save_hugging_face_tokenizer

MISSING = [name for name in ("swift", "mcore_bridge", "transformer_engine") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"NOT RUN: no {MISSING} here; make test-trainer NAME=swift"),
    pytest.mark.timeout(300),
]
if not MISSING:
    os.environ.update(PYTORCH_JIT="0", USE_HF="1", HF_HUB_OFFLINE="1")  # it scripts functions that the CPU mode wraps
    ranks._CONTEXT.set_forkserver_preload(["tests.trainers.swift_on_cpu"])

LAYERS, LAYOUT = 2, QKVLayout(num_attention_heads=4, num_query_groups=2, kv_channels=16)
WEIGHT = "decoder.layers.self_attention.linear_qkv.weight"
HERE = Path(__file__).parent
ASKED = "what is two and two? "
FLAGS = {
    "model_type": "qwen3",
    "template": "qwen3",
    "check_model": "false",
    "ddp_backend": "gloo",
    "use_cpu_initialization": "true",
    "tensor_model_parallel_size": 2,
    "sequence_parallel": "true",
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "max_length": 128,
    "logging_steps": 1,
    "save_steps": 1,
    "add_version": "false",
    "dist_ckpt_optim_fully_reshardable": "true",
    "torch_dtype": "bfloat16",
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "load_from_cache_file": "false",
    "recompute_granularity": "none",
    "callbacks": "longact",
    "external_plugins": HERE / "swift_ready_made.py",
    **dict.fromkeys(
        [
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "bias_dropout_fusion",
            "bias_activation_fusion",
            "cross_entropy_loss_fusion",
        ],
        "false",
    ),
}
GRPO = {
    "rlhf_type": "grpo",
    "reward_funcs": "repetition",
    "micro_batch_size": 1,  # it resumes where what was consumed divides by it
    "num_generations": 4,
    "steps_per_generation": 2,
    "use_vllm": "true",
    "vllm_mode": "colocate",
    "sleep_level": 0,
    "offload_model": "true",
    "offload_optimizer": "true",
    "max_completion_length": 32,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, and questions in it."""
    folder = tmp_path_factory.mktemp("qwen3")
    sizes = {"vocab_size": 320, "hidden_size": 64, "max_position_embeddings": 256}
    make_hf("qwen3", folder, dtype=torch.bfloat16, shard_size="1GB", **sizes)
    save_hugging_face_tokenizer(folder)
    rows = [
        {"messages": [{"role": "user", "content": ASKED * (1 + i % 5)}, {"role": "assistant", "content": ASKED}]}
        for i in range(32)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(command: str, start: Path, folder: Path, iterations: int, **flags: Any) -> Path:
    """Train until an iteration; its folder, with a checkpoint of each."""
    given = FLAGS | {"model": start, "dataset": start / "questions.jsonl", "output_dir": folder}
    given |= {"train_iters": iterations, "lr_decay_style": "constant", **flags}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    program = str(HERE / "swift_on_cpu.py")
    done = ranks.run_program(program, command, *arguments, world_size=2, launcher=False, cpu=False, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def resume(checkpoint: Path) -> dict[str, Any]:
    """Its flags to go on from a checkpoint."""
    return {"mcore_model": checkpoint, "finetune": "false"}


def rows_of(folder: Path, iteration: int) -> list[torch.Tensor]:
    """linear_qkv's weight [layers, rows, h]: of the model, and its fp32 masters."""
    tensors = read(folder / f"checkpoint-{iteration}", iteration)[1]
    return [tensors[WEIGHT], tensors[f"optimizer.state.param.{WEIGHT}"]]


def assert_frozen(folder: Path) -> None:
    """The second step moved the rows that its mask trains, all of them, and no bit of another."""
    state = longact_of(folder / "checkpoint-2", 2)
    trained = [LAYOUT.fused(state["masks"]["q"][i], state["masks"]["k"][i], fill=True) for i in range(LAYERS)]
    assert all(0.4 < mask.float().mean() < 0.5 for mask in trained)  # 25 % of Q and K, all of V
    for old, new in zip(rows_of(folder, 1), rows_of(folder, 2), strict=True):
        for layer, mask in enumerate(trained):
            assert torch.equal((old[layer] != new[layer]).any(1), mask)


def test_sft_freezes_and_goes_on_bitwise(start: Path, tmp_path: Path) -> None:
    straight = train("sft", start, tmp_path / "straight", 2)
    assert_frozen(straight)
    resumed = train("sft", start, tmp_path / "resumed", 2, **resume(straight / "checkpoint-1"))
    (state, tensors), (wanted, weights) = (read(folder / "checkpoint-2", 2) for folder in (resumed, straight))
    assert_bitwise(state["opt_param_scheduler"], wanted["opt_param_scheduler"])
    for name, tensor in weights.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensors[name], tensor), name
    log = [json.loads(line) for line in (straight / "logging.jsonl").read_text().splitlines()]
    assert log[1]["longact/active_fraction_q"] == 0.25


def test_grpo_freezes_while_it_offloads_and_keeps_the_mask(start: Path, tmp_path: Path) -> None:
    straight = train("rlhf", start, tmp_path / "straight", 2, **GRPO)
    assert_frozen(straight)
    resumed = train("rlhf", start, tmp_path / "resumed", 2, **GRPO, **resume(straight / "checkpoint-1"))
    first, after = longact_of(straight / "checkpoint-1", 1), longact_of(resumed / "checkpoint-2", 2)
    assert (after["updates"], after["refreshes"]) == (2, 1)  # of every two steps one selects
    assert_bitwise(after["masks"], first["masks"])
    assert_bitwise(after["saliency"], first["saliency"])
