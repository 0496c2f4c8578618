"""What is not converted, either way: said in one line, with nothing left behind."""

import json
import os
import shutil
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_longact.conversion import to_megatron
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.model_files import check_tokenizer_is_known
from megatron_longact.conversion.torch_dist import iteration_folder, iteration_name
from tests.conversion import (
    FAMILIES,
    MLP_WEIGHT,
    config_of,
    index_of,
    make_hf,
    refused,
    refused_back,
    rewrite,
    shard_of,
    tensors_of,
    there_and_back,
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


def test_missing_shard(hf: Path) -> None:
    shard = shard_of(hf, MLP_WEIGHT)
    first = next(iter(load_file(shard)))
    shard.unlink()
    message = refused(hf)
    assert shard.name in message
    assert first in message


def test_an_index_that_cannot_be_followed_is_refused(hf: Path) -> None:
    index = (hf / "model.safetensors.index.json").read_text()
    shard = shard_of(hf, MLP_WEIGHT).name
    index_of(hf, lambda names: names.update({MLP_WEIGHT: "../other.safetensors"}))
    assert f"says that {MLP_WEIGHT} is in ../other.safetensors, which is outside" in refused(hf)
    (hf / "model.safetensors.index.json").unlink()
    assert "model-00001-of-" in (message := refused(hf))
    assert "but only model.safetensors.index.json says what belongs to the model" in message
    (hf / "model.safetensors.index.json").write_text(index)
    rewrite(
        next(file for file in sorted(hf.glob("*.safetensors")) if file.name != shard),
        lambda t: t.update({MLP_WEIGHT: torch.ones(48, 32)}),
    )
    assert f"{MLP_WEIGHT} is in " in refused(hf)


def test_truncated_file(hf: Path) -> None:
    shard = shard_of(hf, MLP_WEIGHT)
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
    os.truncate(shard_of(hf, MLP_WEIGHT), kept)
    assert "truncated" in refused(hf)


def test_file_that_is_none(hf: Path) -> None:
    shard_of(hf, MLP_WEIGHT).write_bytes(b"\x08\0\0\0\0\0\0\0notajson")
    assert "no safetensors file" in refused(hf)


def test_tensor_of_another_shape(hf: Path) -> None:
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MLP_WEIGHT] = tensors[MLP_WEIGHT].T.contiguous()

    rewrite(shard_of(hf, MLP_WEIGHT), transpose)
    message = refused(hf)
    assert MLP_WEIGHT in message
    assert "[32, 48]" in message
    assert "[48, 32]" in message


def test_tensor_too_many(hf: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(shard_of(hf, MLP_WEIGHT), lambda tensors: tensors.update({name: torch.zeros(48, 32)}))
    assert name in refused(hf)


def test_missing_tensor(hf: Path) -> None:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    shard = shard_of(hf, MLP_WEIGHT)
    rewrite(shard, lambda tensors: tensors.pop(MLP_WEIGHT))
    assert MLP_WEIGHT in refused(hf)  # the index says that it is there
    del index["weight_map"][MLP_WEIGHT]
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{MLP_WEIGHT} is missing" in refused(hf)


def test_dtypes_of_one_megatron_tensor_must_agree(hf: Path) -> None:
    rewrite(shard_of(hf, MLP_WEIGHT), lambda tensors: tensors.update({MLP_WEIGHT: tensors[MLP_WEIGHT].half()}))
    message = refused(hf)
    assert MLP_WEIGHT in message
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


def test_an_iteration_that_is_not_there_is_told_from_those_that_are(hf: Path, tmp_path: Path) -> None:
    load = tmp_path / "megatron"
    to_megatron.convert(hf, load)
    assert iteration_name(load) == "release"
    with pytest.raises(ValueError, match="no iteration 77, it has a converted model, which --ckpt-step does not"):
        iteration_name(load, 77)
    (load / "release").rename(load / "iter_0000012")
    (load / "latest_checkpointed_iteration.txt").write_text("12")
    assert iteration_name(load) == iteration_name(load, 12) == "12"
    with pytest.raises(ValueError, match=r"has no iteration 7, it has 12$"):
        iteration_folder(load, 7)


def test_a_place_without_a_checkpoint_is_not_said_to_remember_no_tokenizer(hf: Path, tmp_path: Path) -> None:
    args = Namespace(tokenizer_type=None, load=str(tmp_path / "run"), pretrained_checkpoint=str(tmp_path / "start"))
    with pytest.raises(ValueError, match=f"no Megatron checkpoint in {tmp_path}/run or {tmp_path}/start, and no --tok"):
        check_tokenizer_is_known(args)
    to_megatron.convert(hf, tmp_path / "start")
    with pytest.raises(ValueError, match=f"^the checkpoint {tmp_path}/start remembers no tokenizer"):
        check_tokenizer_is_known(args)


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
