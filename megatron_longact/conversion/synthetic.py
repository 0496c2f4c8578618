"""Hugging Face folders with random weights of any size, written one tensor at a time: to try and measure tools on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_longact.conversion.command import Throughput
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.mapping import HFTensor, entries_of
from megatron_longact.conversion.staging import staged
from megatron_longact.safetensors_files import SafetensorsWriter


def write(
    config: Mapping[str, Any],
    save: Path,
    *,
    seed: int = 0,
    max_shard_bytes: int = 2_000_000_000,
    tokenizer: bool = False,
) -> str:
    """Write a folder with this config.json and random weights of its dtype; what was written, in a line.

    Norms are near 1, everything else has standard deviation 1 / sqrt(its last size). tokenizer: with one whose tokens
    are bytes, and an end of text. Raises `ValueError` as `model_from_config` does, and for a config without dtype.
    """
    model = model_from_config(config)
    if model.dtype is None:
        raise ValueError("the config names no dtype: float32, bfloat16 or float16")
    tensors = [tensor for entry in entries_of(model) for tensor in entry.hf]
    numel = sum(entry.numel for entry in entries_of(model))
    generator = torch.Generator().manual_seed(seed)
    total = numel * model.dtype.itemsize
    sizes = [(tensor.name, tensor.numel * model.dtype.itemsize) for tensor in tensors]
    with staged(save, source=["synthetic", dict(config), seed], sizes=sizes) as staging:
        shards = _shards(tensors, model.dtype, max_shard_bytes)
        weight_map: dict[str, str] = {}
        with Throughput("random weights", total) as progress:
            for number, shard in enumerate(shards, 1):
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                weight_map |= {tensor.name: name for tensor in shard}
                declared = {tensor.name: (model.dtype, tensor.shape) for tensor in shard}
                with SafetensorsWriter(staging.path / name, declared) as writer:
                    for tensor in shard:
                        value = _random(tensor, generator).to(model.dtype)
                        writer.write(tensor.name, value)
                        progress.add(value.nbytes)
            done = progress.done
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (staging.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer:
            _write_tokenizer(staging.path)
    return f"{save}: {len(tensors)} tensors, {done}"


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*alphabet, end])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def _random(tensor: HFTensor, generator: torch.Generator) -> torch.Tensor:
    value = torch.randn(tensor.shape, generator=generator)
    if len(tensor.shape) == 1:
        return value.mul_(0.1).add_(0.0 if tensor.name.endswith("bias") else 1.0)
    return value.mul_(tensor.shape[-1] ** -0.5)


def _shards(tensors: list[HFTensor], dtype: torch.dtype, max_bytes: int) -> list[list[HFTensor]]:
    shards: list[list[HFTensor]] = []
    size = max_bytes + 1
    for tensor in tensors:
        nbytes = tensor.numel * dtype.itemsize
        if size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards
