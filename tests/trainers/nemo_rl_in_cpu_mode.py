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

importlib.import_module("tests.megatron_in_cpu_mode")
for module in ("megatron.core.extensions.transformer_engine", "accelerate", "peft"):
    importlib.import_module(module)  # what can do without, before it seems to be there
importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")


def _import_bridge() -> None:
    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
    hidden = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names, MagicMock()))
    try:
        importlib.import_module("megatron.bridge")
    finally:
        sys.modules.update(hidden)  # type: ignore[arg-type]


def _seen_by(prefix: str, otherwise: Any, answer: Any) -> Any:
    """A function that answers otherwise where a module asks whose name begins so."""

    def asked() -> Any:
        asks = sys._getframe(1).f_globals.get("__name__", "").startswith(prefix)
        return answer() if asks else otherwise()

    return asked


def this_rank() -> int:
    """The GPU that this rank would have been given."""
    return torch.distributed.get_rank()


_import_bridge()
gpt_provider = importlib.import_module("megatron.bridge.models.gpt_provider")
gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec  # type: ignore[attr-defined]
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
