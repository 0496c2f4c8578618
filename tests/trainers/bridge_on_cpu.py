"""Megatron-Bridge without a GPU or Transformer Engine: what the trainers that build their models by it share."""

import importlib
import sys
from unittest.mock import MagicMock

NAMES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
CPU_SETTINGS = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
}
"""Of a `TransformerConfig`."""


def import_with_bridge(module: str, *, before: tuple[str, ...] = ()) -> None:
    """Import a module that imports Megatron-Bridge, in CPU mode; models are then of megatron-core's own modules.

    before: modules that ask whether Transformer Engine is there, and can do without.
    """
    importlib.import_module("tests.megatron_in_cpu_mode")
    for name in ("megatron.core.extensions.transformer_engine", "accelerate", "peft", *before):
        importlib.import_module(name)
    hidden = {name: sys.modules.get(name) for name in NAMES}
    sys.modules.update(dict.fromkeys(NAMES, MagicMock()))
    try:
        importlib.import_module(module)
    finally:
        sys.modules.update(hidden)  # type: ignore[arg-type]
    gpt_provider = importlib.import_module("megatron.bridge.models.gpt_provider")
    gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec  # type: ignore[attr-defined]
