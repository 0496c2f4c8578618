"""The layout of a model's attention: out of Megatron's configuration, and out of a checkpoint of LongAct's. Pure."""

from collections.abc import Mapping
from typing import Any

from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.mla_layout import MLALayout
from megatron_longact.qkv_layout import QKVLayout


def layout_of(config: Any, attention: Any = None) -> AttentionLayout:
    """What a megatron-core `TransformerConfig` gives its attention.

    attention: one of the modules; whether it has its down-projections fused, no configuration tells.
    """
    if getattr(config, "multi_latent_attention", False):
        fused = hasattr(attention, "linear_qkv_down_proj")
        return MLALayout.from_transformer_config(config, fused_down_projection=fused)
    return QKVLayout.from_transformer_config(config)


def layout_from_saved(saved: Mapping[str, Any]) -> AttentionLayout:
    """The one whose `saved()` it is."""
    return MLALayout(**saved) if "kv_lora_rank" in saved else QKVLayout(**saved)
