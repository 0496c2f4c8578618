"""What the fork server of `tests.ranks` imports once for NeMo-RL: Megatron in CPU mode, and NeMo-RL's policy worker.

NeMo-RL runs as it is but for what needs a GPU or is not called, all of it here:

`transformer_engine`       Megatron-Bridge imports it without asking whether it is there: names without meaning, until
                           it is imported
layers of a model          made of Transformer Engine's modules by Megatron-Bridge; here by its own `local_layer_spec`,
                           of megatron-core's modules
`setup_distributed`        makes process groups of NCCL; here those of gloo are there
a GPU                      Ray says which one it gave, the worker asserts that it is the current one, and
                           Megatron-Bridge that there is one
loggers                    wandb, mlflow and swanlab: names that are imported and not called
`nvidia_resiliency_ext`    a name of its in-process restart, which is imported and not called
"""

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

from tests.trainers.bridge_on_cpu import import_with_bridge


def _seen_by(prefix: str, otherwise: Any, answer: Any) -> Any:
    """A function that answers otherwise where a module asks whose name begins so."""

    def asked() -> Any:
        asks = sys._getframe(1).f_globals.get("__name__", "").startswith(prefix)
        return answer() if asks else otherwise()

    return asked


def this_rank() -> int:
    """The GPU that this rank would have been given."""
    return torch.distributed.get_rank()


import_with_bridge("megatron.bridge", before=("megatron.core.dist_checkpointing.strategies.torch",))
for name in ("mlflow", "swanlab", "wandb"):
    sys.modules[name] = MagicMock()
for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess"):
    sys.modules[name] = ModuleType(name)
sys.modules["nvidia_resiliency_ext.inprocess"].CallWrapper = object  # type: ignore[attr-defined]

_WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker"
worker = importlib.import_module(_WORKER)
worker.setup_distributed = importlib.import_module("megatron.core.parallel_state").destroy_model_parallel  # type: ignore[attr-defined]
worker.ray.get_gpu_ids = lambda: [this_rank()]  # type: ignore[attr-defined]
torch.cuda.current_device = _seen_by(_WORKER, torch.cuda.current_device, this_rank)
torch.cuda.is_available = _seen_by("megatron.bridge.training.initialize", torch.cuda.is_available, lambda: True)
