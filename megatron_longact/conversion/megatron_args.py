"""The arguments of `megatron.training` that describe a model: in a checkpoint, and as flags."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import astuple
from functools import wraps
from pathlib import Path
from typing import Any

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.conversion.mapping import padded_vocab_size
from megatron_longact.conversion.model_files import (
    NEEDS_TOKENIZER,
    TOKENIZER_TYPE,
    check_tokenizer_is_known,
    settle_tokenizer,
)

_YARN = (
    "rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "mscale",
    "mscale_all_dim",
    "yarn_correction_range_round_to_int",
)
"""YaRN's arguments, in the order of the fields of `Yarn`."""

_NOT_TAKEN_BY_MEGATRON = (
    "layernorm_epsilon",
    "qk_layernorm",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    *_YARN,
    "window_size",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "hf_vocab_size",
)
"""What says which model it is, and `--use-checkpoint-args` of megatron-core 0.19 leaves as the flags have it."""


_PLAIN_FLAGS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels max_position_embeddings
    position_embedding_type rotary_base normalization attention_dropout hidden_dropout num_experts moe_router_topk
    moe_ffn_hidden_size
"""


def model_args(model: HFModel) -> dict[str, Any]:
    """Values of Megatron's arguments that build this model, by their names in its namespace."""
    experts, rope = model.experts, model.rope
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "seq_length": model.max_position_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "yarn" if rope.yarn else "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": int(rope.theta) if rope.theta.is_integer() else rope.theta,
        "rotary_percent": model.rope.share,
        "rotary_interleaved": False,
        "use_rope_scaling": rope.llama3_factor is not None,
        "rope_scaling_factor": rope.llama3_factor or 8.0,
        "rotary_seq_len_interpolation_factor": rope.linear_factor,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "apply_layernorm_1p": False,
        "qk_layernorm": model.family.qk_layernorm,
        "add_bias_linear": False,
        "add_qkv_bias": model.family.qkv_bias,
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": 0.0,
        "padded_vocab_size": padded_vocab_size(model),
    }
    if rope.yarn:
        values |= dict(zip(_YARN, astuple(rope.yarn), strict=True))
    if experts is not None:
        values |= {
            "num_experts": experts.count,
            "moe_router_topk": experts.per_token,
            "moe_ffn_hidden_size": experts.intermediate_size,
            "moe_router_pre_softmax": not experts.norm_topk_prob,
            "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
            "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)]
            if model.layers_differ
            else 1,
        }
        if experts.shared_size:
            values["moe_shared_expert_intermediate_size"] = experts.shared_size
        if experts.sigmoid:
            values |= {
                "moe_router_enable_expert_bias": True,
                "moe_router_bias_update_rate": 0.0,  # the bias is a part of the model, and no step of ours changes it
                "moe_router_topk_scaling_factor": experts.scaling,
                "moe_router_dtype": "fp32",
                "moe_router_load_balancing_type": "none",
            }
    return values


def common_state(model: HFModel, *, tokenizer: Path | None) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors; plain values, which Megatron loads without unpickling code.

    tokenizer: the folder of the checkpoint that is going to hold one.
    """
    saved_by = {
        "hf_vocab_size": model.vocab_size,  # an argument of ours: embeddings without Megatron's padding
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "ckpt_format": "torch_dist",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    if tokenizer is not None:
        saved_by |= {"tokenizer_type": TOKENIZER_TYPE, "tokenizer_model": str(tokenizer)}
        saved_by |= {"tokenizer_in_checkpoint": True}  # an argument of ours: the path is that of the checkpoint's own
    return {
        "args": Namespace(**model_args(model), **saved_by),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


def model_flags(model: HFModel) -> list[str]:
    """The same as command-line flags, one a line, for a run without `--use-checkpoint-args`."""
    values = model_args(model)
    plain = [name for name in _PLAIN_FLAGS.split() if name in values]
    flags = [f"--{name.replace('_', '-')} {values[name]}" for name in plain]
    flags += ["--group-query-attention", "--swiglu", "--disable-bias-linear"]
    flags += ["--untie-embeddings-and-output-weights"] * values["untie_embeddings_and_output_weights"]
    flags += ["--add-qkv-bias"] * values["add_qkv_bias"]
    flags += ["--moe-router-pre-softmax"] * values.get("moe_router_pre_softmax", False)
    flags += _flags_of_experts(values)
    return flags + flags_not_taken(model)


def _flags_of_experts(values: dict[str, Any]) -> list[str]:
    """Of those that not every mixture of experts has."""
    flags = [f"--rotary-percent {values['rotary_percent']}"] * (values["rotary_percent"] != 1)
    if isinstance(freq := values.get("moe_layer_freq"), list):
        flags += [f"--moe-layer-freq [0]*{freq.count(0)}+[1]*{freq.count(1)}"]
    names = ("moe_shared_expert_intermediate_size", "moe_router_topk_scaling_factor")
    flags += [f"--{name.replace('_', '-')} {values[name]}" for name in names if name in values]
    if "moe_router_enable_expert_bias" in values:
        flags += ["--moe-router-score-function sigmoid", "--moe-router-enable-expert-bias"]
    return flags


def flags_not_taken(model: HFModel) -> list[str]:
    """Flags of this model that Megatron's own `--use-checkpoint-args` does not set; our launcher does."""
    flags = [f"--norm-epsilon {model.norm_epsilon}"]
    flags += ["--qk-layernorm"] * model.family.qk_layernorm
    if model.experts is not None and model.experts.sigmoid:
        flags += ["--moe-router-bias-update-rate 0", "--moe-router-dtype fp32", "--moe-router-load-balancing-type none"]
    if model.rope.llama3_factor is not None:
        flags += [f"--use-rope-scaling --rope-scaling-factor {model.rope.llama3_factor}"]
    if model.rope.linear_factor is not None:
        flags += [f"--rotary-seq-len-interpolation-factor {model.rope.linear_factor}"]
    if yarn := model.rope.yarn:
        values = zip(_YARN, astuple(yarn), strict=True)
        flags += [f"--{name.replace('_', '-')} {value}" for name, value in values if not isinstance(value, bool)]
        flags += ["--no-yarn-correction-range-round-to-int"] * (not yarn.truncate)
    return flags


def completing(load_args_from_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `load_args_from_checkpoint`, which then also sets what it leaves out.

    For `--use-checkpoint-args`: without these a Qwen3 checkpoint would load into a model without q/k-layernorm, and
    nobody would say so. Whatever the checkpoint says holds, as with the arguments that Megatron sets itself; but of two
    tokenizers the one that is given.
    """

    @wraps(load_args_from_checkpoint)
    def load(args: Namespace, load_arg: str = "load", *rest: Any, **kwargs: Any) -> Any:
        before = args.tokenizer_type, args.tokenizer_model
        result = load_args_from_checkpoint(args, load_arg, *rest, **kwargs)
        if isinstance(result, tuple):
            for name in _NOT_TAKEN_BY_MEGATRON:
                value = getattr(result[1], name, None)
                if value is not None:
                    setattr(args, name, value)
            settle_tokenizer(args, getattr(args, load_arg), result[1], before=before)
        if load_arg == "load" and getattr(args, NEEDS_TOKENIZER, False):  # the last one that is asked
            check_tokenizer_is_known(args)
        return result

    return load


def with_rope_scaling_factor(gpt_config_from_args: Callable[..., Any]) -> Callable[..., Any]:
    """megatron.training's `gpt_config_from_args`, which builds with Llama 3's factor 8 whatever the flag says."""

    @wraps(gpt_config_from_args)
    def from_args(args: Namespace, *rest: Any, **kwargs: Any) -> Any:
        config = gpt_config_from_args(args, *rest, **kwargs)
        config.rope_scaling_factor = args.rope_scaling_factor
        return config

    return from_args
