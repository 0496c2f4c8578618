"""What the fork server of `tests.ranks` imports once in verl's environment: Megatron in CPU mode, and verl's engine.

verl runs as it is but for what needs a GPU, all of it here:

`transformer_engine`    Megatron-Bridge, by which verl builds its models, imports it without asking whether it is there,
                        for adapters and for other models: names without meaning, until it is imported
layers of a model       made of Transformer Engine's modules by Megatron-Bridge; here by its own `local_layer_spec`, of
                        megatron-core's modules
"""

import importlib

from tests.trainers.bridge_on_cpu import import_with_bridge

import_with_bridge("verl.models.mcore.bridge", before=("modelopt.torch.quantization",))
importlib.import_module("verl.workers.engine.megatron.transformer_impl")
