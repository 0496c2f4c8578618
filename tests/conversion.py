"""Tiny models of every family that is converted, and what Megatron makes of them: real files, real load path."""

import io
import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_longact.conversion import to_hf, to_megatron
from tests.ranks import Layout

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3-yarn": {  # as Qwen's own recipe writes it: max_position_embeddings stays
        "model_type": "qwen3",
        "max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3-moe-unnormed": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 8},
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama3": {"model_type": "llama", "rope_parameters": {**_LLAMA3, "factor": 32.0}, "rms_norm_eps": 1e-5},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e3,
            "factor": 2.5,
            "original_max_position_embeddings": 24,
            "attention_factor": 1.3,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
    "glm4-moe": {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "rms_norm_eps": 1e-5},
}


def config_of(name: str, **changed: Any) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model."""
    settings = {**SMALL, **FAMILIES[name], **changed}
    config: transformers.PreTrainedConfig = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config


def make_hf(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "20KB", **changed: Any
) -> None:
    """Save a randomly initialised model of a family, with norms and biases that are not all alike."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **changed), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # a part of the model, which no gradient changes
                buffer.normal_()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes: fp32 [b, s, v]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


_TRAINING = """
    --use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 100 --micro-batch-size 1 --global-batch-size 2
    --train-iters 1 --lr 1e-3 --no-load-optim --no-load-rng
"""


def megatron_logits(
    *, load: Path, tokens: torch.Tensor, sizes: Layout, flags: Sequence[str] = (), fused_norms: bool = False
) -> Any:
    """On each rank: build what the checkpoint's arguments say, load it with Megatron's `load_checkpoint`, run it.

    fused_norms: with modules laid out as Transformer Engine's are. Returns fp32 [b, s, padded v] on the last pipeline
    stage, gathered over tensor-parallel ranks; None on others.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.global_vars import get_args, unset_global_variables

    parallel = [
        f"--tensor-model-parallel-size={sizes.tp}",
        f"--pipeline-model-parallel-size={sizes.pp}",
        f"--expert-model-parallel-size={sizes.ep}",
    ]
    with redirect_stdout(io.StringIO()):
        model = build_from_args(load, [*parallel, *flags], fused_norms=fused_norms)
    try:
        args = get_args()
        with redirect_stdout(io.StringIO()):
            load_checkpoint([model], None, None)
        with torch.no_grad():
            output = run_pipeline(model.eval(), tokens, args)
        if parallel_state.is_pipeline_last_stage():
            return tensor_parallel.gather_from_tensor_model_parallel_region(output).float()
        return None
    finally:
        unset_global_variables()


def parse_args(flags: list[str], **defaults: Any) -> Any:
    """Parse as a program under the launcher does, which has defaults of its own."""
    from megatron.training import arguments, checkpointing

    from megatron_longact.conversion.megatron_args import completing
    from megatron_longact.megatron.cpu import missing_cpu_flags

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *flags, *missing_cpu_flags(flags)])
        complete = completing(checkpointing.load_args_from_checkpoint)
        patch.setattr(checkpointing, "load_args_from_checkpoint", complete)

        def add_args(parser: ArgumentParser) -> ArgumentParser:
            parser.set_defaults(**defaults)
            return parser

        return arguments.parse_and_validate_args(extra_args_provider=add_args)


def remembered_tokenizers(*, calls: Sequence[Sequence[str]]) -> list[tuple[Any, ...] | str]:
    """Of each call's flags with `--use-checkpoint-args`: type, model, and ids of "two"; or why it was refused."""
    from megatron.training.global_vars import get_tokenizer, unset_global_variables

    found: list[tuple[Any, ...] | str] = []
    for flags in calls:
        try:
            with redirect_stdout(io.StringIO()):
                args = parse_args(["--use-checkpoint-args", "--micro-batch-size", "1", *flags], needs_tokenizer=True)
                ids = get_tokenizer().tokenize("two") if args.tokenizer_type == "HuggingFaceTokenizer" else []
            found.append((args.tokenizer_type, args.tokenizer_model, ids))
        except ValueError as refusal:
            found.append(str(refusal))
        finally:
            unset_global_variables()
    return found


def build_from_args(load: Path, flags: list[str], *, fused_norms: bool = False) -> Any:
    """Parse `--load --use-checkpoint-args` as a program does, and build one model chunk."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import argument_utils

    from megatron_longact.conversion.megatron_args import with_rope_scaling_factor

    args = parse_args(["--load", str(load), *_TRAINING.split(), *flags])
    config = with_rope_scaling_factor(argument_utils.gpt_config_from_args)(args)
    if fused_norms:
        config.transformer_layer_spec = fused_norm_spec
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def fused_norm_spec(config: Any) -> Any:
    """Layers with the modules, and so the names in a checkpoint, of Megatron's Transformer Engine spec.

    As in `get_gpt_layer_with_transformer_engine_submodules`: the norm before a dense linear layer is that layer's own
    `layer_norm_weight`, and every module has an `_extra_state`. The computation is the local one.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class NormLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, *rest: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *rest, config=config, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.full((input_size,), torch.nan))

        def forward(self, x: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
            epsilon = self.config.layernorm_epsilon
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, epsilon)
            return super().forward(x, *rest, **kwargs)

    class Attention(DotProductAttention):
        def get_extra_state(self) -> None:
            return None

        def set_extra_state(self, state: Any) -> None:
            assert state is None

    moe = config.transformer.num_moe_experts
    layer = get_gpt_layer_local_submodules(
        num_experts=moe, qk_layernorm=config.transformer.qk_layernorm, normalization="RMSNorm"
    )
    layer.self_attention.submodules.linear_qkv = NormLinear
    layer.self_attention.submodules.core_attention = Attention
    layer.input_layernorm = IdentityOp
    layer.sharded_state_dict_keys_map = {}
    if moe is None:
        layer.pre_mlp_layernorm = IdentityOp
        layer.mlp.keywords["submodules"].linear_fc1 = NormLinear
    return ModuleSpec(module=TransformerLayer, submodules=layer)


def run_pipeline(model: Any, tokens: torch.Tensor, args: Any) -> torch.Tensor:
    """A forward through all pipeline stages: hidden states [s, b, h] or logits [b, s, v / tp]."""
    from megatron.core import parallel_state

    b, s = tokens.shape
    previous, following = (
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
    )
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(s, b, args.hidden_size)
        torch.distributed.recv(hidden, previous)
        model.set_input_tensor(hidden)
    mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    output: torch.Tensor = model(tokens, torch.arange(s).expand(b, s), mask)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), following)
    return output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors package."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_bitwise(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        assert torch.equal(got[name].view(torch.uint8), value.view(torch.uint8)), name


def there_and_back(hf: Path, folder: Path, **kwargs: Any) -> Path:
    to_megatron.convert(hf, folder / "megatron")
    to_hf.convert(folder / "megatron", None, folder / "back", **kwargs)
    return folder / "back"


MLP_WEIGHT = "model.layers.1.mlp.up_proj.weight"


def shard_of(hf: Path, name: str) -> Path:
    """The file that has a tensor, by the index."""
    index: dict[str, Any] = json.loads((hf / "model.safetensors.index.json").read_text())
    return hf / index["weight_map"][name]


def rewrite(path: Path, change: Any) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def index_of(hf: Path, change: Any) -> None:
    """Change which tensor the index says is in which file."""
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(hf: Path) -> str:
    """Convert, which must fail: its message, of one line, with nothing left behind."""
    save = hf.parent / "megatron"
    with pytest.raises(ValueError, match=r"\S") as error:
        to_megatron.convert(hf, save)
    assert "\n" not in str(error.value)
    assert not save.exists()
    assert not save.with_name("megatron.partial").exists()
    return str(error.value)


def refused_back(load: Path, hf_config: Path, save: Path) -> str:
    """The same on the way back."""
    with pytest.raises(ValueError, match=r"\S") as error:
        to_hf.convert(load, hf_config, save)
    assert "\n" not in str(error.value)
    assert not save.exists()
    assert not save.with_name(save.name + ".partial").exists()
    return str(error.value)
