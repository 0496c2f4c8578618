"""Pickles of results: a tensor as its bytes. By itself torch moves each through shared memory, or as an archive."""

import io
import pickle
from typing import Any

import torch


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout != torch.strided:
            return NotImplemented
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (data, value.dtype, value.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def dumps(value: Any) -> bytes:
    """What `pickle.loads` makes into the value again; tensors without their graph, each with memory of its own."""
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()
