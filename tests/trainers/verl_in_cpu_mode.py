"""What the fork server of `tests.ranks` imports once in verl's environment: Megatron in CPU mode, and verl's engine.

verl runs as it is but for what needs a GPU, all of it here:

`transformer_engine`    Megatron-Bridge, by which verl builds its models, imports it without asking whether it is there,
                        for adapters and for other models: names without meaning, until it is imported
layers of a model       made of Transformer Engine's modules by Megatron-Bridge; here by its own `local_layer_spec`, of
                        megatron-core's modules
"""

import importlib
import sys
from unittest.mock import MagicMock

importlib.import_module("tests.megatron_in_cpu_mode")
for module in ("megatron.core.extensions.transformer_engine", "modelopt.torch.quantization", "accelerate", "peft"):
    importlib.import_module(module)  # what can do without, before it seems to be there
_NAMES = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"]
_hidden = {name: sys.modules.get(name) for name in _NAMES}
for name in _NAMES:
    sys.modules[name] = MagicMock()
try:
    importlib.import_module("verl.models.mcore.bridge")
finally:
    for name in _NAMES:
        sys.modules[name] = _hidden[name]  # type: ignore[assignment]
importlib.import_module("verl.workers.engine.megatron.transformer_impl")

gpt_provider = importlib.import_module("megatron.bridge.models.gpt_provider")
gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec  # type: ignore[attr-defined]
