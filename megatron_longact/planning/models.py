"""The models that a plan is made for: built-in ones by name, any other by its config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_longact.conversion.hf_config import HFModel, model_from_config, read_hf_config

_QWEN3: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3,
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-32b": {
        **_QWEN3,
        "model_type": "qwen3",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
    },
}
"""What sizes a model in its config.json, by name."""


def find_model(name: str) -> HFModel:
    """The model of a preset's name (in any case), a Hugging Face folder, or a config.json.

    Raises `ValueError` in one line for anything else.
    """
    preset = PRESETS.get(name.lower())
    if preset is not None:
        return model_from_config(preset, where=name)
    path = Path(name)
    if not path.is_file():
        if not path.is_dir():
            raise ValueError(f"--model is {name!r}: no folder, no config.json and none of {', '.join(PRESETS)}")
        return read_hf_config(path)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return model_from_config(config, where=str(path))
