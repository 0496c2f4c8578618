"""What test_nemo_rl runs on each rank: NeMo-RL's own Megatron policy worker on a tiny Qwen3, with LongAct attached.

What stands in for a GPU is in `nemo_rl_in_cpu_mode`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longact import LongAct
from tests.launch import ROOT
from tests.trainers.two_updates import two_updates

SEQUENCES, LENGTH, VOCABULARY = 8, 24, 320
SETTINGS = [
    "policy.train_global_batch_size=8",
    "policy.train_micro_batch_size=2",
    "policy.max_total_sequence_length=32",
    "policy.generation=null",
    "policy.megatron_cfg.tensor_model_parallel_size=2",
    "policy.megatron_cfg.sequence_parallel=true",
    "policy.megatron_cfg.checkpoint.async_save=false",
    "policy.megatron_cfg.optimizer.lr=1e-2",
    "policy.megatron_cfg.optimizer.min_lr=1e-2",
    "policy.megatron_cfg.scheduler.lr_warmup_iters=0",
    "policy.megatron_cfg.scheduler.lr_warmup_init=0.0",
    "+policy.megatron_cfg.train_iters=100",
    # for the CPU
    "policy.megatron_cfg.apply_rope_fusion=false",
    "policy.megatron_cfg.bias_activation_fusion=false",
    "policy.megatron_cfg.moe_permute_fusion=false",
    "policy.megatron_cfg.optimizer.use_precision_aware_optimizer=false",
]
PACKING = {
    "algorithm": "modified_first_fit_decreasing",
    "input_key": "input_ids",
    "input_lengths_key": "input_lengths",
    "sequence_length_pad_multiple": 2,
    "max_tokens_per_microbatch": 64,
}


def make_worker(folder: Path, checkpoint: Path | None = None) -> Any:
    """The worker as NeMo-RL's worker group makes it on a rank, from NeMo-RL's own example of a configuration."""
    import numpy
    from nemo_rl.distributed.named_sharding import NamedSharding
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl
    from nemo_rl.utils.config import load_config, parse_hydra_overrides, register_omegaconf_resolvers
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    sys.path.append(str(ROOT / "examples" / "integrations"))
    import nemo_rl_worker

    os.environ["NRL_MEGATRON_CHECKPOINT_DIR"] = str(folder / "converted")
    register_omegaconf_resolvers()
    given = load_config(Path(os.environ["NEMO_RL"], "examples/configs/grpo_math_1B_megatron.yaml"))
    given = parse_hydra_overrides(given, [*SETTINGS, f"policy.model_name={folder / 'model'}"])
    axes = ["pipeline_parallel", "data_parallel", "context_parallel", "tensor_parallel"]
    return nemo_rl_worker.with_longact(MegatronPolicyWorkerImpl)(
        OmegaConf.to_container(given, resolve=True)["policy"],
        AutoTokenizer.from_pretrained(folder / "model"),
        weights_path=checkpoint and str(checkpoint),
        optimizer_path=checkpoint and str(checkpoint),
        init_reference_model=False,
        worker_sharding_annotations=NamedSharding(layout=numpy.arange(2).reshape(1, 1, 1, 2), names=axes),
    )


def batch(seed: int) -> Any:
    """Sequences of a step, padded at their right, prompts out of the loss, as the trainer gives them to its policy."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9 + (5 * i + seed) % 15 for i in range(SEQUENCES)])
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    place = torch.arange(LENGTH)[None]
    real = place < lengths[:, None]
    return BatchedDataDict(
        input_ids=ids * real,
        input_lengths=lengths,
        token_mask=(real & (place >= 4)).float(),
        sample_mask=torch.ones(SEQUENCES),
    )


def packed(data: Any, size: int) -> Any:
    """As `Policy` packs what its workers train on."""
    (shard,), _ = data.shard_by_batch_size(1, batch_size=size, sequence_packing_args=PACKING)
    return shard


def train(worker: Any, *, seed: int) -> float:
    """One update, by `train` or, every other, streamed: two calls of a step; its gradient's norm."""
    from nemo_rl.algorithms.loss.loss_functions import NLLLossFn

    data = batch(seed)
    if seed % 2 == 0:
        return float(worker.train(packed(data, SEQUENCES), NLLLossFn())["grad_norm"])
    worker.begin_train_step(NLLLossFn(), gbs=SEQUENCES)
    half = SEQUENCES // 2
    for part in (data.slice(0, half), data.slice(half, SEQUENCES)):
        worker.train_microbatch(packed(part, half))
    return float(worker.finish_train_step()["grad_norm"])


def weights(worker: Any) -> dict[str, Tensor]:
    """Everything that NeMo-RL sends an inference engine, under Hugging Face names."""
    exported = worker.megatron_bridge.export_hf_weights([worker.model], show_progress=False)
    return {name: value.detach().clone() for name, value in exported}


def run(*, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint after the first.

    folder: with a Hugging Face model in `model`.
    """
    from tests.trainers import nemo_rl_in_cpu_mode  # noqa: F401

    worker = make_worker(folder)

    def save() -> None:
        worker.save_checkpoint(str(folder / "saved"), optimizer_path=str(folder / "saved"))

    return two_updates(worker, train=train, weights=weights, save=save)


def resume(*, folder: Path) -> dict[str, Any]:
    """The second update, by a worker that goes on from the checkpoint after the first; in a process of its own."""
    from tests.trainers import nemo_rl_in_cpu_mode  # noqa: F401

    worker = make_worker(folder, folder / "saved")
    longact = LongAct.of(worker.optimizer)
    assert longact is not None
    loaded, started = longact.state_dict(), weights(worker)
    train(worker, seed=1)
    return {"loaded": loaded, "started": started, "state": longact.state_dict(), "weights": weights(worker)}
