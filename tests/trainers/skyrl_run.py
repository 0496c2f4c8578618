"""What test_skyrl runs on each rank: SkyRL's own Megatron policy worker on a tiny Qwen3, with LongAct attached.

What stands in for a GPU is in `skyrl_in_cpu_mode`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longact import LongAct
from tests.launch import ROOT
from tests.trainers.bridge_on_cpu import CPU_SETTINGS
from tests.trainers.two_updates import two_updates

PROMPT, RESPONSE, SEQUENCES, VOCABULARY = 12, 8, 8, 320


def make_worker(model: Path) -> Any:
    """The worker as SkyRL's `PPORayActorGroup` makes it on a rank, at TP 2: constructor, process groups, model."""
    from megatron.core import parallel_state
    from skyrl.train.config.config import (
        AlgorithmConfig,
        MegatronConfig,
        ModelConfig,
        OptimizerConfig,
        PolicyConfig,
        TrainerConfig,
    )

    sys.path.append(str(ROOT / "examples" / "integrations"))
    import skyrl_worker

    parallel_state.destroy_model_parallel()
    policy = PolicyConfig(
        model=ModelConfig(path=str(model)),
        megatron_config=MegatronConfig(tensor_model_parallel_size=2, transformer_config_kwargs=CPU_SETTINGS),
        optimizer_config=OptimizerConfig(lr=1e-2, weight_decay=0.1),
    )
    worker = skyrl_worker.LongActPolicyWorker(
        cfg=TrainerConfig(
            strategy="megatron",
            policy=policy,
            algorithm=AlgorithmConfig(temperature=1.0, kl_loss_coef=0.1),
            micro_train_batch_size_per_gpu=2,
            micro_forward_batch_size_per_gpu=2,
        ),
        world_size=2,
        rank=torch.distributed.get_rank(),
        local_rank=torch.distributed.get_rank(),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        sequence_parallel_size=1,
    )
    worker.init_worker_process_group()
    worker.init_model(str(model), num_training_steps=10)
    return worker


def batch(seed: int) -> Any:
    """Prompts, padded at their left, and responses, at their right, of a step, as the trainer hands them over."""
    from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones_like(ids)
    for row in range(SEQUENCES):
        attention[row, : row % 3] = 0
        attention[row, PROMPT + RESPONSE - row % 4 :] = 0
    response = attention[:, PROMPT:]
    old = torch.full((SEQUENCES, RESPONSE), -4.0)
    data = TrainingInputBatch(
        {
            "sequences": ids * attention,
            "attention_mask": attention,
            "action_log_probs": old,
            "base_action_log_probs": old,
            "advantages": torch.randn(SEQUENCES, 1, generator=generator).expand(-1, RESPONSE) / response.sum(),
            "loss_mask": response,
            "response_mask": response,
        }
    )
    data.metadata = {"response_length": RESPONSE}
    return data


def train(worker: Any, *, seed: int) -> float:
    """One update of two `forward_backward` calls of two micro-batches each, log-probs between them; its norm."""
    for part in batch(seed).chunk(SEQUENCES // 2):
        worker.forward_backward(part)
        worker.forward(part)
    return float(worker.optim_step())


def weights(worker: Any) -> dict[str, Tensor]:
    """Everything that SkyRL sends an inference engine, under Hugging Face names."""
    exported = worker.bridge.export_hf_weights(worker.actor_module, show_progress=False)
    return {name: value.detach().clone() for name, value in exported}


def run(*, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint between them; another worker that goes on from it, and one with a single call.

    folder: with a Hugging Face model in `model`.
    """
    from tests.trainers import skyrl_in_cpu_mode  # noqa: F401

    worker = make_worker(folder / "model")

    def save() -> None:
        worker.save_checkpoint(str(folder / "checkpoint"), tokenizer=worker.tokenizer)

    done = two_updates(worker, train=train, weights=weights, save=save)
    return {**done, "once": once(folder), "resumed": resumed(folder)}


def resumed(folder: Path) -> dict[str, Any]:
    """The second update, from the checkpoint after the first."""
    worker = make_worker(folder / "model")
    longact = LongAct.of(worker.optimizer)
    worker.load_checkpoint(str(folder / "checkpoint"))
    loaded = longact.state_dict()
    train(worker, seed=1)
    return {"loaded": loaded, "state": longact.state_dict(), "weights": weights(worker)}


def once(folder: Path) -> dict[str, Any]:
    """The first update's selection by one call over all of its sequences, and what its second half alone would give."""
    worker = make_worker(folder / "model")
    longact = LongAct.of(worker.optimizer)
    worker.forward_backward(batch(0).chunk(SEQUENCES // 2)[1])
    longact.refresh()
    half = longact.step.pending.state_dict()
    worker.forward_backward(batch(0))
    worker.optim_step()
    return {"half": half, "state": longact.state_dict()}
