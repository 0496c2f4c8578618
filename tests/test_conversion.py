"""Hugging Face → Megatron → Hugging Face: every bit of every tensor comes back; what is wrong is said in one line."""

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_longact.conversion import plan, staging, to_hf, to_megatron
from megatron_longact.conversion.audit import audit
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.mapping import entries_of
from megatron_longact.conversion.model_files import keep_model_files
from megatron_longact.conversion.torch_dist import Chunk, TorchDistReader, TorchDistWriter, iteration_folder
from megatron_longact.safetensors_files import read_header
from tests.conversion import FAMILIES, config_of, make_hf
from tests.ranks import run_program

TOOLS = Path(__file__).parent.parent / "tools"


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


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_comes_back(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_hf(family, tmp_path / "hf", dtype=dtype)
    back = there_and_back(tmp_path / "hf", tmp_path, max_shard_bytes=15_000)
    assert_bitwise(tensors_of(back), tensors_of(tmp_path / "hf"))
    assert (back / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert not (tmp_path / "back.partial").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=dtype)
    assert_bitwise(
        dict(model.state_dict()),
        dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).state_dict()),
    )


def test_special_values_come_back(tmp_path: Path) -> None:
    make_hf("llama2", tmp_path / "hf", shard_size="1GB")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    bits = torch.randint(-(2**31), 2**31 - 1, (48, 32), dtype=torch.int32)  # every NaN, too
    tensors["model.layers.0.mlp.up_proj.weight"] = bits.view(torch.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"][0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert_bitwise(tensors_of(there_and_back(tmp_path / "hf", tmp_path)), tensors)


def test_output_is_sharded_and_indexed(tmp_path: Path) -> None:
    make_hf("qwen3", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "weights.bin").write_text("not copied")
    back = there_and_back(tmp_path / "hf", tmp_path, max_shard_bytes=30_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    names = sorted(file.name for file in back.glob("*.safetensors"))
    assert len(names) > 2
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert set(index["weight_map"].values()) == set(names)
    for name, file in index["weight_map"].items():
        with safe_open(back / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "hf").values())
    assert (back / "tokenizer.json").read_text() == "{}"
    assert (back / "generation_config.json").is_file()
    assert not (back / "weights.bin").exists()
    assert max(sum(t.nbytes for t in load_file(back / name).values()) for name in names) <= 30_000


def test_dtype_in_the_config_is_that_of_the_weights(tmp_path: Path) -> None:
    make_hf("qwen3", tmp_path / "hf", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    back = there_and_back(tmp_path / "hf", tmp_path)
    assert json.loads((back / "config.json").read_text()) == {**config, "dtype": "bfloat16"}


# -- what the real architectures look like ---------------------------------------------------------

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}


@pytest.mark.parametrize(("config", "billions"), [(QWEN3_8B, 8.19), (QWEN3_4B, 4.02)], ids=["8B", "4B"])
def test_dry_run_has_the_shapes_of_the_real_architecture(
    tmp_path: Path, config: dict[str, Any], billions: float
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = plan.plan(tmp_path).split("\n")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    names = {name: list(value.shape) for name, value in model.named_parameters()}  # tied ones once
    shown = {
        line.split(" ")[0]: json.loads(line[line.index("[") : line.index("]") + 1]) for line in lines if "->" in line
    }
    assert shown == names
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert numel / 1e9 == pytest.approx(billions, abs=0.01)
    assert lines[0] == f"qwen3: 36 layers, {numel:,} parameters, {2 * numel / 1e9:.2f} GB in bfloat16"
    assert "--qk-layernorm" in lines[-1]
    assert any("q_proj.weight [4096, " in line and "linear_qkv.weight[35]" in line for line in lines)


GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "partial_rotary_factor": 0.5, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 131072, "model_type": "glm4_moe", "moe_intermediate_size": 1408, "norm_topk_prob": True,
    "num_attention_heads": 96, "n_group": 1, "topk_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "num_hidden_layers": 46,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0", "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip


def test_dry_run_of_glm_has_the_parameters_of_the_real_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GLM_4_5_AIR))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    numel = sum(tensor.numel() for tensor in (*model.parameters(), *biases))
    assert numel / 1e9 == pytest.approx(106.9, abs=0.1)
    lines = plan.plan(tmp_path).split("\n")
    assert lines[0] == f"glm4_moe: 46 layers, {numel:,} parameters, {2 * numel / 1e9:.2f} GB in bfloat16"
    for flag in ("--moe-layer-freq [0]*1+[1]*45", "--rotary-percent 0.5", "--moe-router-enable-expert-bias"):
        assert flag in lines[-1]


def test_layers_that_predict_further_tokens_are_left_aside(tmp_path: Path) -> None:
    make_hf("glm4-moe", tmp_path / "hf", shard_size="1GB")
    file = tmp_path / "hf/model.safetensors"
    wanted = tensors_of(tmp_path / "hf")
    rewrite(file, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(32, 64)}))
    said = to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    assert "left aside: the 1 tensors of model.layers.2., which predict further tokens" in said
    to_hf.convert(tmp_path / "megatron", None, tmp_path / "back")
    assert_bitwise(tensors_of(tmp_path / "back"), wanted)
    assert not any(change.rows_changed for change in audit(tmp_path / "hf", tmp_path / "back").changes)


def test_dry_run_of_the_tool_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    result = tool("convert_hf_to_megatron.py", "--hf-dir", str(tmp_path), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "16.38 GB" in result.stdout
    assert "model.layers.35.mlp.down_proj.weight [4096, 12288]" in result.stdout


# -- what is refused -------------------------------------------------------------------------------


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / name), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 1},
            "sliding_window is 16",
        ),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama3", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, '"longrope"'),
        ("llama2", {"rope_parameters": {"rope_type": "yarn"}}, '"yarn"'),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "finetuned": True}}, "finetuned"),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0}}, "factor is 1.0"),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "sliding_window": 64}, "window is 64"),
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, '"dynamic"'),
        ("llama3", {"rope_parameters": FAMILIES["llama3"]["rope_parameters"] | {"low_freq_factor": 2.0}}, "low_freq"),
        ("llama-linear", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, "2.5"),
        (
            "qwen3",
            {"model_type": "qwen3_next", "attn_output_gate": True},
            "'qwen3_next', of which its linear attention",
        ),
        ("qwen3", {"model_type": "gpt_oss"}, "'gpt_oss', of which its experts (interleaved"),
        ("qwen3", {"model_type": "phi9"}, "model_type is 'phi9'; converted are qwen3,"),
        ("qwen3", {"n_group": 1, "first_k_dense_replace": 1}, "n_group is 1"),
        (
            "glm4-moe",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ("glm4-moe", {"n_group": 2}, "n_group is 2"),
        ("glm4-moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3", {"attn_output_gate": True}, "attn_output_gate is true"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true"),
        ("llama2", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama2", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama2", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama2", {"num_hidden_layers": "two"}, 'num_hidden_layers is "two"'),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ],
)
def test_what_is_not_mapped_is_refused_by_name_and_value(family: str, change: dict[str, Any], named: str) -> None:
    config = json.loads(config_of(family).to_json_string(use_diff=False))
    model_from_config(config)
    if "rope_scaling" in change:
        del config["rope_parameters"]
    with pytest.raises(ValueError, match=r"config\.json") as error:
        model_from_config(config | change)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "qwen3-moe"])
@pytest.mark.parametrize(
    "change",
    [
        {"max_window_layers": 1},
        {"max_window_layers": 2},
        {},
        {"layer_types": ["full_attention"] * 2, "max_window_layers": 0},
        {"partial_rotary_factor": 1.0, "mlp_only_layers": [2], "use_sliding_window": False},
    ],
    ids=str,
)
def test_a_feature_that_no_layer_uses_is_no_reason_to_refuse(family: str, change: dict[str, Any]) -> None:
    """A window that no layer of transformers' model has."""
    config = json.loads(config_of(family).to_json_string(use_diff=False)) | {"layer_types": None}
    config |= {"use_sliding_window": True, "sliding_window": 16} | change
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**{name: value for name, value in config.items() if value is not None})
        )
    if any(layer.self_attn.sliding_window for layer in theirs.model.layers):
        with pytest.raises(ValueError, match="sliding_window is 16"):
            model_from_config(config)
    else:
        model_from_config(config)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    make_hf("qwen3", tmp_path / "hf")
    return tmp_path / "hf"


def refused(hf: Path) -> str:
    """Convert, which must fail: its message, of one line, with nothing left behind."""
    save = hf.parent / "megatron"
    with pytest.raises(ValueError, match=r"\S") as error:
        to_megatron.convert(hf, save)
    assert "\n" not in str(error.value)
    assert not save.exists()
    assert not save.with_name("megatron.partial").exists()
    return str(error.value)


def shard_of(hf: Path, name: str) -> Path:
    index: dict[str, Any] = json.loads((hf / "model.safetensors.index.json").read_text())
    return hf / index["weight_map"][name]


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def test_missing_shard(hf: Path) -> None:
    shard = shard_of(hf, NAME)
    first = next(iter(load_file(shard)))
    shard.unlink()
    message = refused(hf)
    assert shard.name in message
    assert first in message


def other_single_file(hf: Path) -> dict[str, torch.Tensor]:
    """Write a model.safetensors beside the shards, with other values; returns them."""
    tensors = {name: value + 1 for name, value in tensors_of(hf).items()}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("shards", ["all", "some", "none"])
def test_a_single_file_beside_an_index_is_taken_as_transformers_does(hf: Path, shards: str) -> None:
    wanted = other_single_file(hf)
    for number, file in enumerate(sorted(hf.glob("model-*.safetensors"))):
        if shards == "none" or (shards == "some" and number % 2):
            file.unlink()
    (hf / "pytorch_model.bin").write_bytes(b"a pickle")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf).state_dict()
    assert_bitwise(dict(theirs), wanted)
    said = to_megatron.convert(hf, hf.parent / "megatron").splitlines()
    to_hf.convert(hf.parent / "megatron", hf, hf.parent / "back")
    assert_bitwise(tensors_of(hf.parent / "back"), wanted)
    assert said[-2].endswith(
        "has model.safetensors and model.safetensors.index.json: model.safetensors was taken, as transformers does"
    )
    assert said[-1].startswith(f"left aside in {hf}: ")
    assert "pytorch_model.bin" in said[-1] or "more" in said[-1]


def index_of(hf: Path, change: Any) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_that_cannot_be_followed_is_refused(hf: Path) -> None:
    index = (hf / "model.safetensors.index.json").read_text()
    shard = shard_of(hf, NAME).name
    index_of(hf, lambda names: names.update({NAME: "../other.safetensors"}))
    assert f"says that {NAME} is in ../other.safetensors, which is outside" in refused(hf)
    (hf / "model.safetensors.index.json").unlink()
    assert "model-00001-of-" in (message := refused(hf))
    assert "but only model.safetensors.index.json says what belongs to the model" in message
    (hf / "model.safetensors.index.json").write_text(index)
    rewrite(
        next(file for file in sorted(hf.glob("*.safetensors")) if file.name != shard),
        lambda t: t.update({NAME: torch.ones(48, 32)}),
    )
    assert f"{NAME} is in " in refused(hf)


def test_shards_in_a_folder_of_their_own(hf: Path) -> None:
    wanted = tensors_of(hf)
    (hf / "weights").mkdir()
    for file in hf.glob("model-*.safetensors"):
        file.rename(hf / "weights" / file.name)
    index_of(hf, lambda names: names.update({name: f"weights/{file}" for name, file in names.items()}))
    assert_bitwise(tensors_of(there_and_back(hf, hf.parent)), wanted)


def test_files_beside_the_weights_come_along_or_are_named(hf: Path) -> None:
    kept = (
        "tokenizer.model.v3",
        "qwen.tiktoken",
        "preprocessor_config.json",
        "LICENSE",
        "modeling_mine.py",
        "vocab.bpe",
    )
    left = ("README.md", "consolidated.safetensors", "trainer_state.json", "optimizer.pt")
    for name in kept + left:
        (hf / name).write_text(name)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool.jinja").write_text("t")
    said = to_megatron.convert(hf, hf.parent / "megatron").splitlines()[-1]
    assert said == f"left aside in {hf}: README.md, consolidated.safetensors, optimizer.pt, trainer_state.json"
    to_hf.convert(hf.parent / "megatron", hf.parent / "megatron" / "hf", hf.parent / "back")
    for name in (*kept, "additional_chat_templates/tool.jinja"):
        assert (hf.parent / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert not any((hf.parent / "back" / name).exists() for name in left)
    (hf / "adapter_config.json").write_text("{}")
    shutil.rmtree(hf.parent / "megatron")
    assert "merge it into the model first" in refused(hf)


def test_truncated_file(hf: Path) -> None:
    shard = shard_of(hf, NAME)
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    message = refused(hf)
    assert "truncated" in message
    entries = load_header(shard)
    assert max(entries, key=lambda name: entries[name]["data_offsets"]) in message  # the one that is cut


def load_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__")
    return header


@pytest.mark.parametrize("kept", [0, 4, 8, 20])
def test_file_without_a_header(hf: Path, kept: int) -> None:
    os.truncate(shard_of(hf, NAME), kept)
    assert "truncated" in refused(hf)


def test_file_that_is_none(hf: Path) -> None:
    shard_of(hf, NAME).write_bytes(b"\x08\0\0\0\0\0\0\0notajson")
    assert "no safetensors file" in refused(hf)


def test_tensor_of_another_shape(hf: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME] = tensors[NAME].T.contiguous()

    rewrite(shard_of(hf, NAME), transpose)
    message = refused(hf)
    assert NAME in message
    assert "[32, 48]" in message
    assert "[48, 32]" in message


def test_tensor_too_many(hf: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(shard_of(hf, NAME), lambda tensors: tensors.update({name: torch.zeros(48, 32)}))
    assert name in refused(hf)


def test_missing_tensor(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    shard = shard_of(hf, NAME)
    rewrite(shard, lambda tensors: tensors.pop(NAME))
    assert NAME in refused(hf)  # the index says that it is there
    del index["weight_map"][NAME]
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{NAME} is missing" in refused(hf)


def test_dtypes_of_one_megatron_tensor_must_agree(hf: Path) -> None:
    rewrite(shard_of(hf, NAME), lambda tensors: tensors.update({NAME: tensors[NAME].half()}))
    message = refused(hf)
    assert NAME in message
    assert "float16 and float32" in message


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    make_hf("qwen3", tmp_path / "hf", shard_size="1GB")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    message = refused(tmp_path / "hf")
    assert "pytorch_model.bin is a pickle, which is never loaded" in message


def test_tied_copy_of_the_embedding(tmp_path: Path) -> None:
    make_hf("qwen3-tied", tmp_path / "hf", shard_size="1GB")
    path = tmp_path / "hf" / "model.safetensors"
    embedding = load_file(path)["model.embed_tokens.weight"]
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "lm_head.weight" in refused(tmp_path / "hf")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    back = tensors_of(there_and_back(tmp_path / "hf", tmp_path))
    assert "lm_head.weight" not in back
    assert torch.equal(back["model.embed_tokens.weight"], embedding)


def test_existing_target_is_left_alone(hf: Path) -> None:
    save = hf.parent / "megatron"
    save.mkdir()
    (save / "precious").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        to_megatron.convert(hf, save)
    assert (save / "precious").read_text() == "kept"


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    make_hf("qwen3", tmp_path / "hf", shard_size="1GB")
    path, name = tmp_path / "hf" / "model.safetensors", "model.embed_tokens.weight"
    rows = 10**13 // 128  # 10 TB, of which the file has nothing but the length
    header = load_header(path)
    begin, end = header[name]["data_offsets"]
    data = path.read_bytes()[-max(entry["data_offsets"][1] for entry in header.values()) :]
    moved = {n: e for n, e in header.items() if n != name}
    offset, kept = 0, []
    for entry in moved.values():
        old_begin, old_end = entry["data_offsets"]
        kept.append(data[old_begin:old_end])
        entry["data_offsets"] = [offset, offset + old_end - old_begin]
        offset += old_end - old_begin
    moved[name] = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [offset, offset + rows * 128]}
    text = json.dumps(moved).encode()
    assert end > begin
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(kept))
    os.truncate(path, 8 + len(text) + offset + rows * 128)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": rows, "tie_word_embeddings": True}))
    rewrite_header(path, drop="lm_head.weight")
    assert "too full from model.embed_tokens.weight on" in refused(tmp_path / "hf")


def rewrite_header(path: Path, *, drop: str) -> None:
    """Take a tensor's name out of a header, in place."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header.pop(drop)
        file.seek(8)
        file.write(json.dumps(header).encode().ljust(length))


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_write_that_fails_half_way_names_the_tensor_and_leaves_nothing(tmp_path: Path, direction: str) -> None:
    """A file-size limit fails in the same place as a full disk, and needs no disk to fill."""
    make_hf("qwen3", tmp_path / "hf")
    to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    save = tmp_path / "out"
    arguments = {
        "to megatron": ["convert_hf_to_megatron.py", "--hf-dir", tmp_path / "hf"],
        "to hf": ["convert_megatron_to_hf.py", "--load", tmp_path / "megatron", "--hf-config", tmp_path / "hf"],
    }[direction]
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED.format(limit=20_000))
    command = [limited, TOOLS / arguments[0], *arguments[1:], "--save", save]
    result = run_program(*map(str, command), launcher=False, cpu=False)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(r"cannot write .*model\.\S+\.weight", result.stderr)
    assert "File too large" in result.stderr
    assert not save.exists()
    assert not save.with_name("out.partial").exists()


# -- stopped half-way ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_longact.conversion import staging, to_hf, to_megatron
note, left = staging.Staging.note, [2]
def note_then_die(self, unit, record):
    note(self, unit, record)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.note = note_then_die
"""
TO_MEGATRON = "to_megatron.convert(Path(sys.argv[1]), Path(sys.argv[2]))"


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C, when two files are finished."""
    note, left = staging.Staging.note, [2]

    def note_then_stop(self: staging.Staging, unit: str, record: Any) -> None:
        note(self, unit, record)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(staging.Staging, "note", note_then_stop)
        yield
    assert not left[0]


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".metadata")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_killed_conversion_is_not_there_and_goes_on(hf: Path, tmp_path: Path) -> None:
    whole, target = tmp_path / "whole", tmp_path / "megatron"
    to_megatron.convert(hf, whole)
    program = tmp_path / "killed.py"
    program.write_text(KILLED + TO_MEGATRON)
    killed = run_program(str(program), str(hf), str(target), launcher=False, cpu=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = target.with_name("megatron.partial")
    files = {file: file.stat().st_mtime_ns for file in (partial / "release").glob("*.distcp")}
    assert len(files) == 2
    message = to_megatron.convert(hf, target)
    assert "were there already" in message
    assert not partial.exists()
    for file, written in files.items():
        assert (target / "release" / file.name).stat().st_mtime_ns == written
    assert digests(target) == digests(whole)


def test_interrupted_way_back_goes_on(hf: Path, tmp_path: Path) -> None:
    load, target = tmp_path / "megatron", tmp_path / "back"
    to_megatron.convert(hf, load)
    with interrupted():
        to_hf.convert(load, hf, target, max_shard_bytes=40_000)
    assert not target.exists()
    files = list((tmp_path / "back.partial").glob("*.safetensors"))
    assert len(files) == 2
    written = [file.stat().st_mtime_ns for file in files]
    assert "were there already" in to_hf.convert(load, hf, target, max_shard_bytes=40_000)
    assert [(target / file.name).stat().st_mtime_ns for file in files] == written
    assert_bitwise(tensors_of(target), tensors_of(hf))


def test_another_source_is_not_mixed_in(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    with interrupted():
        to_megatron.convert(hf, target)
    rewrite(shard_of(hf, NAME), lambda tensors: tensors.update({NAME: tensors[NAME] + 1}))
    os.utime(shard_of(hf, NAME), ns=(0, 0))
    assert "were there already" not in to_megatron.convert(hf, target)
    to_hf.convert(target, hf, tmp_path / "back")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging.staged(target, source=1, sizes=[]) as first:
        (first.path / "file").write_text("ours")
        with (
            pytest.raises(ValueError, match="another process is writing"),
            staging.staged(target, source=1, sizes=[]),
        ):
            raise AssertionError
    assert (target / "file").read_text() == "ours"


# -- the way back ----------------------------------------------------------------------------------


def test_a_run_takes_config_and_tokenizer_with_it(hf: Path, tmp_path: Path) -> None:
    """From the checkpoint that it began with to its own, once, and on the way back they are taken from there."""
    (hf / "tokenizer.json").write_text("{}")
    start, run = tmp_path / "start", tmp_path / "run"
    to_megatron.convert(hf, start)
    shutil.copytree(start, run, ignore=shutil.ignore_patterns("hf"))
    args = Namespace(load=str(run), pretrained_checkpoint=str(start / "release"), save=str(run))
    keep_model_files(args)
    shutil.rmtree(start)
    keep_model_files(args)
    to_hf.convert(run, None, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["hf", "latest_checkpointed_iteration.txt", "model_args.txt", "release"]
    )
    shutil.rmtree(run / "hf")
    with pytest.raises(ValueError, match=f"{run} carries no config.json: give --hf-config"):
        to_hf.convert(run, None, tmp_path / "more")


def refused_back(load: Path, hf_config: Path, save: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        to_hf.convert(load, hf_config, save)
    assert "\n" not in str(error.value)
    assert not save.exists()
    assert not save.with_name(save.name + ".partial").exists()
    return str(error.value)


def test_checkpoint_of_another_model_is_refused(hf: Path, tmp_path: Path) -> None:
    to_megatron.convert(hf, tmp_path / "megatron")
    config = json.loads((hf / "config.json").read_text())
    for change, named in (
        ({"num_hidden_layers": 3}, "decoder.layers.self_attention.linear_qkv.layer_norm_weight has shape [2, 32]"),
        ({"intermediate_size": 40}, "decoder.layers.mlp.linear_fc1.weight"),
        ({"tie_word_embeddings": True}, "output_layer.weight has no place"),
        ({"vocab_size": 200}, "embedding.word_embeddings.weight has shape [128, 32]"),
        ({"model_type": "llama", "architectures": None}, "q_layernorm.weight has no place"),
        ({"model_type": "qwen2", "architectures": None, "head_dim": 16}, "linear_qkv.bias"),
    ):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps(config | change))
        assert named in refused_back(tmp_path / "megatron", other, tmp_path / "back")


def test_damaged_checkpoint_is_refused(hf: Path, tmp_path: Path) -> None:
    to_megatron.convert(hf, tmp_path / "megatron")
    for damage, named in (
        (lambda folder: os.truncate(folder / "__2_0.distcp", 4000), "decoder.layers."),
        (lambda folder: (folder / "__1_0.distcp").unlink(), "decoder.layers."),
        (lambda folder: os.truncate(folder / ".metadata", 100), ".metadata"),
        (lambda folder: (folder / "metadata.json").unlink(), "no torch_dist checkpoint"),
    ):
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "megatron", tmp_path / "damaged")
        damage(tmp_path / "damaged" / "release")
        assert named in refused_back(tmp_path / "damaged", hf, tmp_path / "back")
    assert "no Megatron checkpoint" in refused_back(tmp_path, hf, tmp_path / "back")


def write_layer_by_layer(load: Path, save: Path) -> None:
    """The same checkpoint with a tensor of its own for each layer, as Megatron writes layers that are not alike."""
    reader = TorchDistReader(iteration_folder(load))
    save.mkdir()
    writer = TorchDistWriter(save)
    chunks = []
    for key in reader.tensors:
        shape = reader.shape(key)
        whole = reader.read(key, [0] * len(shape), shape)
        for layer in range(shape[0]) if key.startswith("decoder.layers.") else [None]:
            name = key if layer is None else key.replace("layers.", f"layers.{layer}.")
            part = whole if layer is None else whole[layer].clone()
            writer.declare(name, part.shape, part.dtype)
            chunks.append(Chunk(name, (0,) * part.dim(), part, name))
    writer.write_file("__0_0", iter(chunks))
    writer.finish()


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_a_checkpoint_with_a_tensor_for_each_layer_converts(tmp_path: Path, family: str) -> None:
    make_hf(family, tmp_path / "hf")
    to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    write_layer_by_layer(tmp_path / "megatron", tmp_path / "layers")
    to_hf.convert(tmp_path / "layers", tmp_path / "hf", tmp_path / "back")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    message = refused_back(tmp_path / "layers", tmp_path / "other", tmp_path / "more")
    assert "decoder.layers.1." in message
    assert "has no place" in message


DEMO = Path(__file__).parent.parent / "examples" / "demo" / "start_checkpoint"
DEMO_CONFIG = QWEN3_8B | {
    "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True, "rope_theta": 10000,
    "max_position_embeddings": 1024,
}  # fmt: skip


def test_a_checkpoint_that_megatron_wrote_converts(tmp_path: Path) -> None:
    """The demo's start checkpoint, trained on two ranks, against its tensors as torch reads them."""
    (tmp_path / "config.json").write_text(json.dumps(DEMO_CONFIG))
    to_hf.convert(DEMO, tmp_path, tmp_path / "hf")
    saved: dict[str, torch.Tensor] = {}
    reader = FileSystemReader(DEMO / "iter_0000800")
    _load_state_dict(saved, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    back = tensors_of(tmp_path / "hf")
    assert len(back) == 3 * 11 + 2
    assert torch.equal(back["model.embed_tokens.weight"], saved["embedding.word_embeddings.weight"][:1000])
    fused = saved["decoder.layers.self_attention.linear_qkv.weight"][2].view(2, 4, 32, 128)  # groups of Q Q K V
    assert torch.equal(back["model.layers.2.self_attn.q_proj.weight"], fused[:, :2].reshape(128, 128))
    assert torch.equal(back["model.layers.2.self_attn.k_proj.weight"], fused[:, 2].reshape(64, 128))
    assert torch.equal(back["model.layers.2.self_attn.v_proj.weight"], fused[:, 3].reshape(64, 128))
    gate_up = saved["decoder.layers.mlp.linear_fc1.weight"][1]
    assert torch.equal(back["model.layers.1.mlp.up_proj.weight"], gate_up[384:])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"


def test_checkpoint_of_megatron_bridge(hf: Path, tmp_path: Path) -> None:
    bridge = pytest.importorskip("megatron.bridge", exc_type=ImportError)
    bridge.AutoBridge.import_ckpt(hf_model_id=str(hf), megatron_path=str(tmp_path / "bridge"))
    to_hf.convert(tmp_path / "bridge", hf, tmp_path / "back")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_headers_are_what_the_package_reads(hf: Path) -> None:
    for file in hf.glob("*.safetensors"):
        ours, metadata = read_header(file)
        assert metadata == {"format": "pt"}
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == set(ours)
            for name in ours:
                assert torch.equal(theirs.get_tensor(name), ours[name].read())
                assert torch.equal(theirs.get_tensor(name)[1:5], ours[name].read(slice(1, 5)))


def test_every_name_is_there_once() -> None:
    for family in FAMILIES:
        model = model_from_config(json.loads(config_of(family).to_json_string(use_diff=False)))
        names = [tensor.name for entry in entries_of(model) for tensor in entry.hf]
        assert len(names) == len(set(names))
