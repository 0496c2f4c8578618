"""Megatron's torch_dist checkpoints, one tensor at a time and without Megatron.

A torch_dist checkpoint is a folder of torch.distributed.checkpoint: files of serialized chunks one after the other, and
`.metadata` with the global shape of every tensor, the chunks it is made of, and their places. Megatron asks for the
parts that its layout needs, whatever the chunks are, so a checkpoint from here loads at any TP, PP and EP. What is not
a tensor stands in one object, `common_state` (megatron/core/dist_checkpointing/serialization.py, `save`).
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

COMMON = "common_state/shard_0_1"
"""Key of the object that holds what is not a tensor, as Megatron's `ShardedObject.unique_key` makes it."""
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Chunk:
    """A chunk of a tensor: where in the tensor it begins, and its values."""

    key: str
    offsets: tuple[int, ...]
    tensor: Tensor
    source: str
    """What it is made from, for messages."""


class TorchDistWriter:
    """Writes a checkpoint file by file. `record`s of finished files go into a journal and come back from it."""

    def __init__(self, path: Path) -> None:
        """path: the folder of one iteration."""
        self.path = path
        self._records: list[list[Any]] = []
        self._tensors: dict[str, TensorStorageMetadata] = {}

    def declare(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """A tensor of the checkpoint: global shape and dtype."""
        self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), []))

    def write_file(self, name: str, chunks: Iterator[Chunk], *, objects: dict[str, Any] | None = None) -> list[Any]:
        """Write one file; the record of what stands where in it. Raises `ValueError` with a tensor's name."""
        record: list[list[Any]] = []
        file_name = f"{name}.distcp"
        source = "its objects"
        try:
            with (self.path / file_name).open("wb") as file:
                for key, value in (objects or {}).items():
                    start = file.tell()
                    torch.save([value], file)
                    record.append([key, None, None, start, file.tell() - start, file_name])
                for chunk in chunks:
                    source, start = chunk.source, file.tell()
                    torch.save(chunk.tensor, file)
                    sizes = list(chunk.tensor.shape)
                    record.append([chunk.key, list(chunk.offsets), sizes, start, file.tell() - start, file_name])
                    del chunk  # before the next one is made
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot write {source} to {self.path / file_name}: {_line(_first(error))}") from error
        self.take(record)
        return record

    def take(self, record: list[Any]) -> None:
        """Take over a record: of a file that an earlier start wrote."""
        self._records.extend(record)

    def finish(self) -> None:
        """Write the checkpoint's metadata, after the last file."""
        entries: dict[str, Any] = dict(self._tensors)
        results = []
        for key, offsets, sizes, start, length, file_name in self._records:
            index = MetadataIndex(key)
            if offsets is None:
                entries[key] = BytesStorageMetadata()
            else:
                chunks = self._tensors[key].chunks
                index = MetadataIndex(key, torch.Size(offsets), len(chunks))
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            results.append(WriteResult(index, length, _StorageInfo(file_name, start, length)))
        FileSystemWriter(self.path).finish(Metadata(entries), [results])
        (self.path / "metadata.json").write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )


class TorchDistReader:
    """Reads parts of tensors out of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """path: the folder of one iteration, as `iteration_folder` finds it."""
        self.path = path
        self._reader = FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
        except Exception as error:
            raise ValueError(f"cannot read {path / '.metadata'}: {_line(error)}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._by_layer: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.tensors[key].properties.dtype

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of a tensor. Raises `ValueError` with its name if the files do not hold it, or hold it broken."""
        part = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self._chunks_near(key, part), [part])
        found = sum(item.lengths.numel() for item in items)
        if found != part.sizes.numel():
            raise ValueError(f"{self.path} holds {found} of the {part.sizes.numel()} elements of {key}")
        target = torch.empty(part.sizes, dtype=self.dtype(key))
        with _named(f"cannot read {key} from {self.path}"):
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def _chunks_near(self, key: str, part: ChunkStorageMetadata) -> TensorStorageMetadata:
        """The tensor with the chunks of a part's layer alone, where that is possible: experts make many thousands."""
        whole = self.tensors[key]
        if len(part.sizes) < 2 or part.sizes[0] != 1:
            return whole
        if key not in self._by_layer:
            layers = self._by_layer[key] = {}
            for chunk in whole.chunks:
                for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    layers.setdefault(layer, []).append(chunk)
        chunks = self._by_layer[key].get(part.offsets[0], [])
        return TensorStorageMetadata(whole.properties, whole.size, chunks)


class _Into(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do."""


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever a broken file makes of torch's reader, one line that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_line(error)}") from error


def _first(error: BaseException) -> BaseException:
    """The error of the file that torch's own error came from."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return error


def _line(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__).split("\n")[0]


def latest_iteration(load: str | Path) -> str:
    """What the tracker file of `--load` names: an iteration, or "release"; ValueError where there is none."""
    try:
        return (Path(load) / TRACKER).read_text().strip()
    except OSError as error:
        raise ValueError(f"{load} holds no Megatron checkpoint: it has no {TRACKER}") from error


def iteration_name(load: str | Path, ckpt_step: int | None = None) -> str:
    """What is loaded, as `latest_iteration` has it; `ValueError` where the iteration that is asked for is not there."""
    latest = latest_iteration(load)
    name = latest if ckpt_step is None else str(ckpt_step)
    if name.isdecimal() and not Path(load, _folder_of(name)).is_dir():
        there = sorted(int(path.name[5:]) for path in Path(load).glob("iter_*") if path.name[5:].isdecimal())
        release = "a converted model, which --ckpt-step does not name" if Path(load, "release").is_dir() else "none"
        raise ValueError(f"{load} has no iteration {name}, it has {', '.join(map(str, there)) or release}")
    return name


def _folder_of(name: str) -> str:
    return f"iter_{int(name):07d}" if name.isdecimal() else name


def iteration_folder(load: Path, ckpt_step: int | None = None) -> Path:
    """The folder of one iteration in what is given to `--load`: the latest, or that of `ckpt_step`.

    A folder of one iteration may be given itself. Raises `ValueError` if there is no torch_dist checkpoint.
    """
    folder = load
    if not (load / "metadata.json").is_file():
        name = iteration_name(load, ckpt_step)
        folder = load / _folder_of(name)
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{folder} is no torch_dist checkpoint: save it with --ckpt-format torch_dist")
    return folder


def read_common_state(folder: Path) -> dict[str, Any]:
    """What is not a tensor in the checkpoint of one iteration; this imports Megatron."""
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    with _named(f"cannot read the common state of {folder}"):
        state: dict[str, Any] = load_common_state_dict(folder)
    return state
