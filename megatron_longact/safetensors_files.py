"""safetensors files, read and written one tensor at a time.

The `safetensors` package maps a file into memory, and what was read stays resident until the file is closed; and it
writes a file from tensors that all exist at once. Here a tensor is read into memory of its own, whole or some rows of
it, and a file is written from a list of names and shapes whose values follow one after the other. The format: eight
bytes with the length of a JSON header, the header, the data. No pickle anywhere.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, dtype, shape, and the place of its first byte."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows. Raises `ValueError` with its name if the file cannot be read."""
        shape, offset = self.shape, self.offset
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * prod(shape[1:]) * self.dtype.itemsize
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                _fill(file, bytes_of(tensor))
        except OSError as error:
            raise ValueError(f"cannot read {self.name} from {self.path}: {error.strerror or error}") from error
        return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    assert tensor.is_contiguous()
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _fill(file: IO[bytes], memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise OSError("the file ends before the tensor does")
        done += count


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, and its metadata.

    Raises `ValueError` with one line for a file that is missing, is none of these, or ends before its tensors do;
    then with the name of the first one that is cut.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if 0 < length <= min(_LONGEST_HEADER, size - 8) else b""
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if not text:
        raise ValueError(f"{path} is truncated, or no safetensors file: its header is not there")
    tensors, metadata = _parse(path, text)
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset + tensor.nbytes > size:
            raise ValueError(
                f"{path} is truncated: {tensor.name} should end at byte {tensor.offset + tensor.nbytes}, the file "
                f"has {size}"
            )
    return tensors, metadata


def _parse(path: Path, text: bytes) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        items = [(name, item["dtype"], tuple(item["shape"]), *item["data_offsets"]) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error})") from error
    tensors = {}
    for name, dtype, shape, begin, end in items:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype}; read are {', '.join(DTYPES)}")
        tensor = StoredTensor(path, name, DTYPES[dtype], shape, 8 + len(text) + begin)
        if tensor.nbytes != end - begin:
            raise ValueError(
                f"{path}: {name} has {end - begin} bytes, its shape {list(shape)} asks for {tensor.nbytes}"
            )
        tensors[name] = tensor
    return tensors, metadata


class SafetensorsWriter:
    """Writes one file: the header at once, then the tensors in its order, each when it is there.

    A context manager; the file is whole, and on the disk, when it ends without an exception.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """tensors: dtype and shape by name, in the order in which `write` will be called."""
        self.path = path
        self._expected = list(tensors.items())
        self._header = _header(tensors, metadata or {"format": "pt"})
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "SafetensorsWriter":
        self._file = self.path.open("wb")
        self._file.write(self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        assert self._file is not None
        wanted = self._expected.pop(0)
        assert wanted == (name, (tensor.dtype, tuple(tensor.shape))), f"{wanted} expected, got {name}"
        self._file.write(bytes_of(tensor.contiguous()))

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        assert self._file is not None
        with self._file as file:
            if kind is None:
                assert not self._expected, f"not written: {self._expected}"
                file.flush()
                os.fsync(file.fileno())


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text
