"""What the fork server of `tests.ranks` imports once in SkyRL's environment: Megatron in CPU mode, and SkyRL's worker.

SkyRL runs as it is but for what a GPU or the package index does not give, all of it here:

`transformer_engine`       Megatron-Bridge imports it without asking whether it is there, for adapters and for other
                           models: names without meaning, until it is imported
layers of a model          made of Transformer Engine's modules by Megatron-Bridge; here by its own `local_layer_spec`,
                           of megatron-core's modules
`nvidia_resiliency_ext`    of which SkyRL takes the queue of checkpoints that are written in the background: here the
                           one of megatron-core, from which it comes
expert adapters            two functions for LoRA on experts, which SkyRL imports from a Megatron-Bridge newer than the
                           index's: without adapters the one does nothing, the other is `finalize_model_grads`
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from tests.trainers.bridge_on_cpu import import_with_bridge


def _stand_in(name: str, **members: Any) -> None:
    """A module of that name, and the packages around it, with these members."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), ModuleType(parts[i - 1]))
    vars(sys.modules[name]).update(members)


import_with_bridge("megatron.bridge")
adapters = importlib.import_module("megatron.bridge.peft.utils")
adapters.enable_expert_parallel_grad_sync_in_finalize = lambda model: None  # type: ignore[attr-defined]
adapters.finalize_model_grads_with_expert_adapter_sync = importlib.import_module(  # type: ignore[attr-defined]
    "megatron.core.distributed"
).finalize_model_grads
_stand_in(
    "nvidia_resiliency_ext.checkpointing.async_ckpt.core",
    AsyncCallsQueue=importlib.import_module("megatron.core.dist_checkpointing.strategies.async_utils").AsyncCallsQueue,
)
importlib.import_module("skyrl.backends.skyrl_train.workers.megatron.megatron_worker")
