"""Megatron → Hugging Face: a torch_dist checkpoint becomes a folder of safetensors, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_longact.conversion.command import Throughput
from megatron_longact.conversion.fused import hf_parts
from megatron_longact.conversion.hf_config import HFModel, read_hf_config
from megatron_longact.conversion.hf_folder import INDEX, copy_companions
from megatron_longact.conversion.mapping import Entry, entries_of
from megatron_longact.conversion.model_files import model_files_of
from megatron_longact.conversion.staging import Staging, identity, staged
from megatron_longact.conversion.torch_dist import TorchDistReader, iteration_folder
from megatron_longact.safetensors_files import SafetensorsWriter

_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.", "mtp.")
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Conversion:
    """A checked conversion: names, shapes and chunks fit before anything is written."""

    model: HFModel
    reader: TorchDistReader
    entries: list[Entry]
    as_dtype: torch.dtype | None = None
    """What all tensors are written in; None: what they have in the checkpoint."""

    @classmethod
    def check(cls, folder: Path, hf_config: Path, *, dtype: torch.dtype | None = None) -> "Conversion":
        """Hold the checkpoint against config.json; `ValueError` with the name of what does not fit."""
        model = read_hf_config(hf_config)
        conversion = cls(model, TorchDistReader(folder), entries_of(model), dtype)
        for entry in conversion.entries:
            conversion._check_entry(entry)
        used = {key for entry in conversion.entries for key, _ in _places(entry)}
        for key in conversion.reader.tensors:
            if key.startswith(_MODEL_PARTS) and key not in used:
                raise ValueError(f"{folder}: {key} has no place in {hf_config / 'config.json'}")
        return conversion

    def _check_entry(self, entry: Entry) -> None:
        key, index = self.place(entry)
        shape, wanted = self.reader.shape(key), (*entry.leading[len(entry.index) - len(index) :], *entry.shape)
        fits = shape == wanted
        if entry.layout == "vocab" and len(shape) == len(wanted):
            fits = shape[0] >= wanted[0] and shape[1:] == wanted[1:]
        if not fits:
            raise ValueError(
                f"{self.reader.path}: {key} has shape {list(shape)}, {entry.hf[0].name} asks for {list(wanted)}"
            )
        if self.reader.dtype(key) not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{self.reader.path}: {key} is {self.reader.dtype(key)}; written are 32 and 16 bit floats")

    def place(self, entry: Entry) -> tuple[str, tuple[int, ...]]:
        """The tensor of the checkpoint that holds an entry, and where on its first axes."""
        for key, index in _places(entry):
            if key in self.reader.tensors:
                return key, index
        raise ValueError(f"{self.reader.path} has no {entry.key}, which {entry.hf[0].name} comes from")

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of an entry's tensors where they are written."""
        return self.as_dtype or self.reader.dtype(self.place(entry)[0])

    def nbytes(self, entries: Iterable[Entry]) -> int:
        """Size of some entries."""
        return sum(entry.numel * self.dtype(entry).itemsize for entry in entries)

    def shards(self, max_bytes: int) -> list[list[Entry]]:
        """The entries by file: as many as fit."""
        shards: list[list[Entry]] = []
        size = max_bytes + 1
        for entry in self.entries:
            nbytes = self.nbytes([entry])
            if size + nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += nbytes
        return shards


def _places(entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Where an entry may be: Megatron writes all layers as one tensor, or each as its own where they are not alike."""
    for key in filter(None, (entry.key, entry.also)):
        yield key, entry.index
        if entry.index:
            yield key.replace("decoder.layers.", f"decoder.layers.{entry.index[0]}.", 1), entry.index[1:]


def convert(
    load: Path,
    hf_config: Path | None,
    save: Path,
    *,
    ckpt_step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> str:
    """Convert the Megatron checkpoint in `load` into the Hugging Face folder `save`; what was done, in a line.

    hf_config: a folder with config.json, and what else belongs to the model: tokenizer, generation settings; None: the
    one that the checkpoint carries. dtype: of all that is written; None: as in the checkpoint. Raises `ValueError` with
    one line, before anything is written where the input is at fault.
    """
    folder = iteration_folder(load, ckpt_step)
    hf_config = hf_config or model_files_of(load)
    if hf_config is None:
        raise ValueError(f"{load} carries no config.json: give --hf-config and the folder that the model came from")
    conversion = Conversion.check(folder, hf_config, dtype=dtype)
    files = [hf_config / "config.json", *sorted(file for file in folder.iterdir() if file.is_file())]
    config_text = (hf_config / "config.json").read_text()
    total = conversion.nbytes(conversion.entries)
    sizes = [(t.name, t.numel * conversion.dtype(entry).itemsize) for entry in conversion.entries for t in entry.hf]
    with (
        staged(save, source=["to hf", max_shard_bytes, str(dtype), *map(identity, files)], sizes=sizes) as staging,
        Throughput("to Hugging Face", total) as progress,
    ):
        _write(conversion, conversion.shards(max_shard_bytes), staging, progress)
        copy_companions(hf_config, staging.path)
        (staging.path / "config.json").write_text(_with_dtype(config_text, conversion))
        done = progress.done
    return f"{save}: {sum(len(entry.hf) for entry in conversion.entries)} tensors, {done}"


def _write(conversion: Conversion, shards: list[list[Entry]], staging: Staging, progress: Throughput) -> None:
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for entry in entries for tensor in entry.hf}
        if staging.finished(name) is not None:
            progress.skip(conversion.nbytes(entries))
            continue
        _write_shard(conversion, entries, staging.path / name, progress)
        staging.note(name, True)
    index = {"metadata": {"total_size": conversion.nbytes(conversion.entries)}, "weight_map": weight_map}
    (staging.path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(conversion: Conversion, entries: list[Entry], path: Path, progress: Throughput) -> None:
    tensors = {tensor.name: (conversion.dtype(entry), tensor.shape) for entry in entries for tensor in entry.hf}
    name = next(iter(tensors))
    try:
        with SafetensorsWriter(path, tensors) as writer:
            for entry in entries:
                key, offsets = conversion.place(entry)
                start = (*offsets, *(0 for _ in entry.shape))
                values = conversion.reader.read(key, start, (*(1 for _ in offsets), *entry.shape)).view(entry.shape)
                values = values.to(conversion.dtype(entry))
                for tensor, part in hf_parts(entry, conversion.model, values):
                    name = tensor.name
                    writer.write(name, part)
                del values, part
                progress.add(conversion.nbytes([entry]))
    except OSError as error:
        raise ValueError(f"cannot write {name} to {path}: {error.strerror or error}") from error


def _with_dtype(config_text: str, conversion: Conversion) -> str:
    """config.json with the dtype that the weights have; the very text where it says so already."""
    config: dict[str, Any] = json.loads(config_text)
    attention = next(entry for entry in conversion.entries if entry.layout == "qkv")
    dtype = str(conversion.dtype(attention)).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) == dtype:
        return config_text
    return json.dumps({**config, key: dtype}, indent=2) + "\n"
