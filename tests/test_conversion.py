"""Hugging Face → Megatron → Hugging Face: every bit of every tensor comes back, and what else is in a folder."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
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

from megatron_longact.conversion import plan, to_hf, to_megatron
from megatron_longact.conversion.audit import audit
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.mapping import entries_of
from megatron_longact.conversion.model_files import keep_model_files
from megatron_longact.conversion.torch_dist import Chunk, TorchDistReader, TorchDistWriter, iteration_folder
from megatron_longact.safetensors_files import read_header
from tests.conversion import (
    FAMILIES,
    assert_bitwise,
    config_of,
    index_of,
    make_hf,
    refused,
    refused_back,
    rewrite,
    tensors_of,
    there_and_back,
)
from tests.launch import ROOT


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


# -- files beside the weights, and other places of them ----------------------------------------------


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


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


DEMO = ROOT / "examples" / "demo" / "start_checkpoint"
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
