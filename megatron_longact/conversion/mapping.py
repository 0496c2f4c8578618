"""Which Megatron tensor holds which Hugging Face tensors, as data, and a model's table of them.

A table's line names one Megatron tensor and the Hugging Face tensors that make it up, with their shapes in letters:

    h hidden size   f, m, s intermediate size of an MLP, of an expert, of the shared experts
    q, k channels of all query heads, of all groups
    d channels of one head   e number of experts   v vocabulary

`decoder.layers.*` tensors have all layers in one, along a first axis, and experts along a second one, where all layers
are alike; else `decoder.layers.N.*` are tensors of their own. Megatron makes these layouts in its `sharded_state_dict`
(megatron/core/transformer/transformer_block.py). Layer norms are under the
names that Transformer Engine's fused layers have, for which Megatron's local layers have a map of their own
(megatron/core/models/gpt/gpt_layer_specs.py, `sharded_state_dict_keys_map`); only before experts do the two differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from megatron_longact.conversion.hf_config import HFModel

Layout = Literal["rows", "qkv", "vocab"]
"""rows: one after the other; qkv: query group by query group, `[Q heads | K | V]`; vocab: rows, with padding."""


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    layout: Layout = "rows"
    when: str = ""
    """Only in models that have this: a name of `_features`, with a leading ! only in those that have not."""
    also: str = ""
    """A second Megatron name of the same tensor."""


_ATTENTION = "self_attn.q_proj.{0} self_attn.k_proj.{0} self_attn.v_proj.{0}"
_QKV_WEIGHT, _QKV_BIAS = (tuple(_ATTENTION.format(part).split()) for part in ("weight", "bias"))
_QK_NORM = "qk_layernorm"
_NORM_BEFORE_MLP = "mlp.linear_fc1.layer_norm_weight"
_EXPERT = "mlp.experts.{expert}."

LAYER: tuple[Rule, ...] = (
    Rule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), ("h",)),
    Rule("self_attention.linear_qkv.weight", _QKV_WEIGHT, ("q h", "k h", "k h"), "qkv"),
    Rule("self_attention.linear_qkv.bias", _QKV_BIAS, ("q", "k", "k"), "qkv", when="qkv_bias"),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), ("d",), when=_QK_NORM),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), ("d",), when=_QK_NORM),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), ("h q",)),
    Rule(_NORM_BEFORE_MLP, ("post_attention_layernorm.weight",), ("h",), when="!experts"),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("f h", "f h"), when="!experts"),
    Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ("h f",), when="!experts"),
    Rule(
        "pre_mlp_layernorm.weight",
        ("post_attention_layernorm.weight",),
        ("h",),
        when="experts",
        also=_NORM_BEFORE_MLP,  # local layers map it there also before experts, Transformer Engine's do not
    ),
    Rule("mlp.router.weight", ("mlp.gate.weight",), ("e h",), when="experts"),
    Rule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), ("e",), when="sigmoid"),
    Rule(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        ("s h", "s h"),
        when="shared",
    ),
    Rule("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_experts.down_proj.weight",), ("h s",), when="shared"),
    Rule(
        "mlp.experts.experts.linear_fc1.weight",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        ("m h", "m h"),
        when="experts",
    ),
    Rule("mlp.experts.experts.linear_fc2.weight", (_EXPERT + "down_proj.weight",), ("h m",), when="experts"),
)
"""Of each layer: Megatron's `decoder.layers.`, Hugging Face's `model.layers.N.`."""

BEFORE: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("v h",), "vocab"),
)
"""Before the layers."""

AFTER: tuple[Rule, ...] = (
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("h",)),
    Rule("output_layer.weight", ("lm_head.weight",), ("v h",), "vocab", when="!tied"),
)
"""After the layers."""


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """Some Hugging Face tensors, and the part of one Megatron tensor that they are."""

    key: str
    index: tuple[int, ...]
    """Layer, and expert: where on the first axes of the Megatron tensor; () for a tensor without them."""
    leading: tuple[int, ...]
    """Sizes of those axes."""
    hf: tuple[HFTensor, ...]
    layout: Layout
    also: str = ""
    by_itself: bool = False
    """Whether Megatron writes each layer's tensor by itself."""

    @property
    def stored(self) -> "Entry":
        """The entry as Megatron writes it: key, index and axes of the tensor that it is a part of."""
        if not self.by_itself or not self.index:
            return self
        own = f"decoder.layers.{self.index[0]}."
        key, also = (name.replace("decoder.layers.", own, 1) for name in (self.key, self.also))
        return replace(self, key=key, also=also, index=self.index[1:], leading=self.leading[1:], by_itself=False)

    @property
    def rows(self) -> int:
        """Rows of the part, without padding."""
        return sum(tensor.shape[0] for tensor in self.hf)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part, without the leading axes and without padding."""
        return (self.rows, *self.hf[0].shape[1:])

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return prod(self.shape)

    @property
    def unit(self) -> int:
        """Number of the layer, from 1; 0: no layer."""
        return self.index[0] + 1 if self.index else 0


def entries_of(model: HFModel) -> list[Entry]:
    """Every tensor of a model: what stands before the layers, layer by layer, and what stands after them."""
    table = [entry for rule in BEFORE if _applies(rule, model, None) for entry in _expanded(rule, model, None)]
    for layer in range(model.num_layers):
        for rule in LAYER:
            if _applies(rule, model, layer):
                table.extend(_expanded(rule, model, layer))
    table.extend(entry for rule in AFTER if _applies(rule, model, None) for entry in _expanded(rule, model, None))
    return table


def _features(model: HFModel, layer: int | None) -> dict[str, bool]:
    experts = model.experts if layer is not None and model.has_experts(layer) else None
    return {
        "qk_layernorm": model.family.qk_layernorm,
        "qkv_bias": model.family.qkv_bias,
        "experts": experts is not None,
        "shared": experts is not None and experts.shared_size > 0,
        "sigmoid": experts is not None and experts.sigmoid,
        "tied": model.tied,
    }


def _applies(rule: Rule, model: HFModel, layer: int | None) -> bool:
    return not rule.when or _features(model, layer)[rule.when.removeprefix("!")] != rule.when.startswith("!")


def _sizes(model: HFModel) -> dict[str, int]:
    experts = model.experts
    return {
        "h": model.hidden_size,
        "f": model.intermediate_size,
        "m": experts.intermediate_size if experts else 0,
        "e": experts.count if experts else 0,
        "s": experts.shared_size if experts else 0,
        "d": model.head_dim,
        "q": model.num_attention_heads * model.head_dim,
        "k": model.num_query_groups * model.head_dim,
        "v": model.vocab_size,
    }


def _expanded(rule: Rule, model: HFModel, layer: int | None) -> Iterator[Entry]:
    sizes = _sizes(model)
    shapes = [tuple(sizes[letter] for letter in shape.split()) for shape in rule.shapes]
    prefix = "" if layer is None else f"model.layers.{layer}."
    index, leading = ((), ()) if layer is None else ((layer,), (model.num_layers,))
    key = rule.megatron if layer is None else f"decoder.layers.{rule.megatron}"
    also = f"decoder.layers.{rule.also}" if rule.also else ""
    if "{expert}" not in rule.hf[0]:
        named = tuple(HFTensor(prefix + name, shape) for name, shape in zip(rule.hf, shapes, strict=True))
        yield Entry(key, index, leading, named, rule.layout, also, model.layers_differ)
        return
    for expert in range(sizes["e"]):
        names = (prefix + name.format(expert=expert) for name in rule.hf)
        named = tuple(HFTensor(name, shape) for name, shape in zip(names, shapes, strict=True))
        yield Entry(key, (*index, expert), (*leading, sizes["e"]), named, rule.layout, also, model.layers_differ)


PADDED_TO = 128
"""The vocabulary is padded to a multiple of this, Megatron's default of `--make-vocab-size-divisible-by`."""


def padded_vocab_size(model: HFModel) -> int:
    """Rows of the embedding in the Megatron checkpoint; divides by every tensor-parallel size that divides 128."""
    return -(-model.vocab_size // PADDED_TO) * PADDED_TO
