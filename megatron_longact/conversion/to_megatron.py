"""Hugging Face → Megatron: a folder of safetensors becomes a torch_dist checkpoint, one tensor at a time."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from megatron_longact.conversion.command import Throughput
from megatron_longact.conversion.fused import megatron_parts
from megatron_longact.conversion.hf_config import HFModel, read_hf_config
from megatron_longact.conversion.hf_folder import HFFolder, copy_companions
from megatron_longact.conversion.mapping import Entry, entries_of, padded_vocab_size
from megatron_longact.conversion.megatron_args import common_state, flags_not_taken, model_flags
from megatron_longact.conversion.model_files import HF_FILES, has_tokenizer
from megatron_longact.conversion.staging import Staging, identity, staged
from megatron_longact.conversion.torch_dist import COMMON, TRACKER, Chunk, TorchDistWriter
from megatron_longact.versions import check_programs

ITERATION = "release"
"""Megatron's name for a checkpoint that no training made: it has no optimizer and starts at iteration 0."""
_WITH_EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_SHARED_WITH_EXTRA_STATE = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_EXPERTS_WITH_EXTRA_STATE = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class Conversion:
    """A checked conversion: everything that can be wrong with the input is known before anything is written."""

    model: HFModel
    folder: HFFolder
    entries: list[Entry]

    @classmethod
    def check(cls, hf_dir: Path) -> "Conversion":
        """Read config.json and all headers; `ValueError` as `read_hf_config` and `HFFolder` raise it."""
        model = read_hf_config(hf_dir)
        entries = entries_of(model)
        folder = HFFolder.open(hf_dir)
        folder.check(entries, tied=model.tied, aside=model.aside)
        conversion = cls(model, folder, entries)
        _ = conversion.dtypes
        return conversion

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each Megatron tensor; `ValueError` if its parts have several."""
        dtypes: dict[str, torch.dtype] = {}
        first: dict[str, Entry] = {}
        for entry in (entry.stored for entry in self.entries):
            self.folder.dtype_of((*first.setdefault(entry.key, entry).hf, *entry.hf))
            dtypes[entry.key] = self.folder.dtype_of(entry.hf)
        return dtypes

    @property
    def nbytes(self) -> int:
        """Size of all weights."""
        return sum(entry.numel * self.dtypes[entry.stored.key].itemsize for entry in self.entries)

    @property
    def sizes(self) -> list[tuple[str, int]]:
        """Hugging Face's tensors, and their bytes."""
        return [(t.name, t.numel * self.dtypes[entry.stored.key].itemsize) for entry in self.entries for t in entry.hf]

    def global_shape(self, entry: Entry) -> tuple[int, ...]:
        """Shape of the Megatron tensor that an entry is a part of."""
        rows = padded_vocab_size(self.model) if entry.layout == "vocab" else entry.rows
        return (*entry.leading, rows, *entry.shape[1:])


def convert(hf_dir: Path, save: Path) -> str:
    """Convert `hf_dir` into the Megatron checkpoint `save`; what was done, in lines to show.

    Raises `ValueError` with one line, before anything is written where the input is at fault.
    """
    check_programs("conversion to Megatron")
    conversion = Conversion.check(hf_dir)
    files = [hf_dir / "config.json", *sorted({stored.path for stored in conversion.folder.tensors.values()})]
    with (
        staged(save, source=["to megatron", *map(identity, files)], sizes=conversion.sizes) as staging,
        Throughput("to Megatron", conversion.nbytes) as progress,
    ):
        own = Path(os.path.abspath(save), HF_FILES) if has_tokenizer(hf_dir) else None
        _write(conversion, staging, progress, common=common_state(conversion.model, tokenizer=own))
        (staging.path / HF_FILES).mkdir(exist_ok=True)
        copy_companions(hf_dir, staging.path / HF_FILES)
        (staging.path / "model_args.txt").write_text("\n".join(model_flags(conversion.model)) + "\n")
        (staging.path / TRACKER).write_text(ITERATION)
        done = progress.done
    folder = quote(str(save))
    lines = [
        f"{save}: {sum(len(entry.hf) for entry in conversion.entries)} tensors, {done}",
        f"train it with --pretrained-checkpoint {folder} --load RUN --save RUN --use-checkpoint-args, where RUN gets "
        "the run's own checkpoints, from which a second start goes on; look at it with "
        f"--load {folder} --use-checkpoint-args; without our launcher also with what Megatron does not take "
        f"from there: {' '.join(flags_not_taken(conversion.model))}",
    ]
    if conversion.model.rope.llama3_factor not in (None, 8.0):
        lines.append(
            "careful: without our launcher megatron.training 0.19 builds with a RoPE scaling factor of 8, whatever "
            "--rope-scaling-factor says; see docs/checkpoints.md"
        )
    lines += conversion.folder.left_aside(conversion.model.aside)
    return "\n".join(lines)


def _write(conversion: Conversion, staging: Staging, progress: Throughput, *, common: dict[str, Any]) -> None:
    path = staging.path / ITERATION
    path.mkdir(exist_ok=True)
    writer = TorchDistWriter(path)
    for entry in (entry.stored for entry in conversion.entries):
        for key in filter(None, (entry.key, entry.also)):
            writer.declare(key, conversion.global_shape(entry), conversion.dtypes[entry.key])
    for number, (unit, group) in enumerate(groupby(conversion.entries, key=lambda entry: entry.unit)):
        entries, name = [entry.stored for entry in group], f"__{number}_0"
        record = staging.finished(name)
        if record is not None:
            writer.take(record)
            progress.skip(sum(entry.numel * conversion.dtypes[entry.key].itemsize for entry in entries))
            continue
        objects = {COMMON: common} if number == 0 else _extra_states(conversion.model, unit)
        staging.note(name, writer.write_file(name, _chunks(conversion, entries, progress), objects=objects))
    writer.finish()


def _chunks(conversion: Conversion, entries: list[Entry], progress: Throughput) -> Iterator[Chunk]:
    tensors = conversion.folder.tensors
    for entry in entries:
        parts = megatron_parts(
            entry, conversion.model, lambda tensor: tensors[tensor.name].read(), conversion.dtypes[entry.key]
        )
        for row, part, source in parts:
            offsets = (*entry.index, row, *(0 for _ in entry.shape[1:]))
            values = part.view(*(1 for _ in entry.index), *part.shape)
            for key in filter(None, (entry.key, entry.also)):
                yield Chunk(key, offsets, values, source)
            del part, values  # before the next one is read
        progress.add(entry.numel * conversion.dtypes[entry.key].itemsize)


def _extra_states(model: HFModel, unit: int) -> dict[str, Any]:
    """The empty `_extra_state` of each module of a layer, or of what stands after them; Megatron asks for it.

    In it Transformer Engine keeps scales of FP8. None is what megatron-core's own layers store, and what every version
    of Transformer Engine takes for "nothing".
    """
    if not unit:
        return {"decoder.final_layernorm._extra_state/shard_0_1": None}
    layer, own = f"{unit - 1}_{model.num_layers}", "decoder.layers."
    if model.layers_differ:
        layer, own = "0_1", f"decoder.layers.{unit - 1}."
    places = {name: [layer] for name in _WITH_EXTRA_STATE}
    if model.experts is not None and model.has_experts(unit - 1):
        count, (index, size) = model.experts.count, layer.split("_")
        per_expert = [f"{index}.{expert}_{size}.{count}" for expert in range(count)]
        if model.layers_differ:
            per_expert = [f"{expert}_{count}" for expert in range(count)]
        places |= dict.fromkeys(_EXPERTS_WITH_EXTRA_STATE, per_expert)
        places |= {name: [layer] for name in _SHARED_WITH_EXTRA_STATE}
    return {f"{own}{name}._extra_state/shard_{place}": None for name in places for place in places[name]}
