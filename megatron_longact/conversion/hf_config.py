"""What a Hugging Face `config.json` says of a model, read without `transformers`.

Everything in the file is either taken over, known to change nothing, or refused by name and value: a key that this
module does not know is never passed over in silence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_longact.conversion.config_reader import ConfigReader
from megatron_longact.conversion.hf_rope import Rope, rope_of

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes of weights that are converted, as config.json names them."""


@dataclass(frozen=True)
class Family:
    """What sets one `model_type` apart from the others; adding a family is adding one of these."""

    architecture: str
    qk_layernorm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    head_dim: int | None = None
    """Channels of a head where config.json does not say; None: hidden_size / num_attention_heads."""
    sliding_window: int | None = None
    """The window where config.json does not say; None: none."""
    window_is_optional: bool = True
    """Whether the window is in use only with `use_sliding_window`."""
    window_by_layer: bool = False
    """Whether only some layers have it: those that `layer_types` names, or from `max_window_layers` on."""
    by_config: Mapping[str, str] = field(default_factory=dict)
    """Features that config.json decides on, above and here, by the key that does."""
    rotary_share: float = 1.0
    """Share of a head's channels that are rotated, where config.json does not say."""
    sigmoid_router: bool = False
    """Experts as GLM-4.5 and DeepSeek-V3 have them: scores are sigmoids, a bias takes part in the choice, some layers
    have none, and all tokens pass through shared ones."""


FAMILIES: dict[str, Family] = {
    "qwen3": Family("Qwen3ForCausalLM", qk_layernorm=True, head_dim=128, window_by_layer=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_layernorm=True, experts=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window_by_layer=True),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", sliding_window=4096, window_is_optional=False),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        experts=True,
        sigmoid_router=True,
        rotary_share=0.5,
        by_config={"attention_bias": "qkv_bias", "use_qk_norm": "qk_layernorm"},
    ),
}
"""By `model_type`."""

_NOT_CONVERTED = {
    "gpt_oss": "its experts (interleaved gate and up, clamped, with biases, in MXFP4)",
    "qwen3_next": "its linear attention layers and its gated attention",
    "qwen3_5": "its linear attention layers and its gated attention",
    "qwen3_5_moe": "its linear attention layers and its gated attention",
    "glm4": "its norms behind attention and MLP",
    "deepseek_v3": "its multi-head latent attention",
}
"""Families that people ask for, and what of them has no place in the mapping."""

_DESCRIPTIVE = """
    architectures auto_map bos_token_id chunk_size_feed_forward decoder_start_token_id dtype eos_token_id
    finetuning_task gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder label2id
    max_window_layers model_type name_or_path output_attentions output_hidden_states output_router_logits pad_token_id
    prefix pretraining_tp
    problem_type return_dict return_dict_in_generate router_aux_loss_coef sep_token_id task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version unk_token_id unsloth_version use_cache
"""
_MAPPED = """
    attention_dropout head_dim hidden_act hidden_size intermediate_size layer_types max_position_embeddings
    moe_intermediate_size norm_topk_prob num_attention_heads num_experts num_experts_per_tok num_hidden_layers
    num_key_value_heads num_local_experts rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings use_sliding_window vocab_size decoder_sparse_step
    mlp_only_layers partial_rotary_factor
"""
_OF_SIGMOID_ROUTERS = """
    n_routed_experts n_shared_experts routed_scaling_factor n_group topk_group first_k_dense_replace
    num_nextn_predict_layers num_mtp_layers
"""
_KNOWN = frozenset((_DESCRIPTIVE + _MAPPED).split())


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, in every layer but the first ones."""

    count: int
    per_token: int
    intermediate_size: int
    norm_topk_prob: bool
    dense_layers: int = 0
    """Layers at the beginning that have none."""
    shared_size: int = 0
    """Intermediate size of the shared ones together."""
    sigmoid: bool = False
    scaling: float = 1.0
    """What the weights of the chosen ones are multiplied by."""


@dataclass(frozen=True)
class HFModel:
    """A decoder-only model as config.json describes it."""

    model_type: str
    family: Family
    """Its entry, with what config.json decides."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    """As config.json says it, or as far as YaRN takes the model where that is farther."""
    norm_epsilon: float
    tied: bool
    attention_dropout: float = 0.0
    rope: Rope = field(default_factory=Rope)
    experts: Experts | None = None
    mtp_layers: int = 0
    """Layers behind the others that predict further tokens; they are left aside."""
    dtype: torch.dtype | None = None
    """What config.json says; the files have the last word."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, has experts."""
        return self.experts is not None and layer >= self.experts.dense_layers

    @property
    def aside(self) -> tuple[str, ...]:
        """How the names of tensors begin that are not converted: of the layers that predict further tokens."""
        return tuple(f"model.layers.{self.num_layers + further}." for further in range(self.mtp_layers))

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have experts and others none: Megatron then writes each layer's tensors by themselves."""
        return self.experts is not None and self.experts.dense_layers > 0


def read_hf_config(folder: Path) -> HFModel:
    """The model of `folder/config.json`.

    Raises `ValueError` with one line if the file is missing or broken, and by name and value for what is not mapped.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; a Hugging Face folder has one") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return model_from_config(config, where=str(path))


def model_from_config(config: Mapping[str, Any], *, where: str = "config.json") -> HFModel:
    """The model that a configuration describes; errors as in `read_hf_config`."""
    reader = _Reader(config, where)
    family = reader.family()
    reader.refuse_unmapped(family)
    decided: dict[str, Any] = {name: bool(config.get(key)) for key, name in family.by_config.items()}
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    groups = reader.size("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}")
    return HFModel(
        model_type=config["model_type"],
        family=replace(family, **decided),
        num_layers=reader.size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=reader.size("head_dim", family.head_dim or hidden // heads),
        vocab_size=reader.size("vocab_size"),
        max_position_embeddings=reader.positions(),
        norm_epsilon=reader.number("rms_norm_eps"),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_dropout=reader.number("attention_dropout", 0.0),
        rope=reader.rope(),
        experts=reader.experts(family) if family.experts else None,
        mtp_layers=int(config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0),
        dtype=DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")),
    )


class _Reader(ConfigReader):
    def family(self) -> Family:
        model_type = self.config.get("model_type")
        if model_type not in FAMILIES:
            missing = _NOT_CONVERTED.get(str(model_type))
            why = f", of which {missing} is not mapped: docs/checkpoints.md names others' tools" if missing else ""
            raise ValueError(f"{self.where}: model_type is {model_type!r}{why}; converted are {', '.join(FAMILIES)}")
        family = FAMILIES[str(model_type)]
        architectures = self.config.get("architectures") or [family.architecture]
        if architectures != [family.architecture]:
            raise ValueError(f"{self.where}: architectures is {architectures}; converted is {family.architecture}")
        return family

    def refuse_unmapped(self, family: Family) -> None:
        """Everything that would make another model than the one Megatron builds."""
        config = self.config
        known = {*_KNOWN, *family.by_config, *(_OF_SIGMOID_ROUTERS.split() if family.sigmoid_router else ())}
        for name, value in config.items():
            if name not in known and not name.startswith("_") and value not in (None, False, 0, "", [], {}):
                self.refuse(name, value, "take it out if it does not change the model")
        if config.get("hidden_act", "silu") != "silu":
            self.refuse("hidden_act", config["hidden_act"], "silu would work")
        for name in ("num_experts", "num_local_experts"):
            if config.get(name) and not family.experts:
                self.refuse(name, config[name], f"{family.architecture} is converted without experts")
        if config.get("decoder_sparse_step", 1) != 1:
            self.refuse("decoder_sparse_step", config["decoder_sparse_step"], "1, experts in every layer, would work")
        if family.sigmoid_router:
            for name, wanted in (("norm_topk_prob", True), ("n_group", 1), ("topk_group", 1)):
                if config.get(name, wanted) != wanted:
                    self.refuse(name, config[name], f"{json.dumps(wanted)} would work")
        if any(layer in range(self.size("num_hidden_layers")) for layer in config.get("mlp_only_layers") or []):
            self.refuse("mlp_only_layers", config["mlp_only_layers"], "[], experts in every layer, would work")
        if any(kind != "full_attention" for kind in config.get("layer_types") or []):
            self.refuse("layer_types", sorted(set(config["layer_types"])), "full_attention would work")
        self._refuse_window(family)

    def _refuse_window(self, family: Family) -> None:
        if family.window_is_optional and not self.config.get("use_sliding_window", False):
            return
        if family.window_by_layer and self._has_no_window_layer():
            return
        window = self.config.get("sliding_window", family.sliding_window)
        if window is not None and window < self.positions():
            self.refuse("sliding_window", window, "null, attention over everything, would work")

    def _has_no_window_layer(self) -> bool:
        """Whether no layer has the window that config.json names; with `layer_types` these were looked at already."""
        first = self.number("max_window_layers", 28)  # transformers' own default
        return bool(self.config.get("layer_types")) or first >= self.size("num_hidden_layers")

    def rope(self) -> Rope:
        """As `rope_of`, in the reader's family."""
        return rope_of(self, default_share=FAMILIES[self.config["model_type"]].rotary_share)

    def experts(self, family: Family) -> Experts:
        known = ("num_experts", "num_local_experts", "n_routed_experts")
        count = self.size(next((name for name in known if name in self.config), known[0]))
        per_token, size = self.size("num_experts_per_tok"), self.size("moe_intermediate_size")
        if not family.sigmoid_router:
            return Experts(count, per_token, size, bool(self.config.get("norm_topk_prob", False)))
        return Experts(
            count,
            per_token,
            size,
            norm_topk_prob=True,
            dense_layers=int(self.number("first_k_dense_replace", 0)),
            shared_size=int(self.number("n_shared_experts", 0)) * size,
            sigmoid=True,
            scaling=self.number("routed_scaling_factor", 1.0),
        )

    def positions(self) -> int:
        """As far as the model goes; Qwen's own recipe for YaRN leaves `max_position_embeddings` as it was."""
        yarn = self.rope().yarn
        scaled = int(yarn.factor * yarn.original_positions) if yarn else 0
        return max(self.size("max_position_embeddings"), scaled)
