"""The device "cuda" means the CPU: factory functions, tensors and modules of torch, and stand-ins for torch.cuda."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_CPU = torch.device("cpu")
_ASSERTS_CUDA = ("megatron.training.initialize", "transformer_engine.pytorch.module.base")


def put_cuda_on_the_cpu() -> None:
    """The first thing to do: what is imported later may keep torch's functions."""
    _redirect_factories()
    _redirect_tensor_methods()
    _replace_torch_cuda()


def _is_cuda(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _to_cpu(value: Any) -> Any:
    return _CPU if _is_cuda(value) else value


def _on_cpu(function: Callable[..., Any], *, keyword: str = "device") -> Callable[..., Any]:
    """`function` with a CUDA device in keyword `keyword` replaced by the CPU, and never pinned memory."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get(keyword)):
            kwargs[keyword] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _redirect_factories() -> None:
    # The set is cached in torch and compares functions by identity (`with torch.device("meta")` uses it), so it has
    # to be taken before the functions are replaced.
    from torch.utils._device import _device_constructors

    likes = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
    names = {f.__name__ for f in _device_constructors()} | set(likes)
    for name in sorted(names):
        if hasattr(torch, name):
            setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.load = _on_cpu(torch.load, keyword="map_location")


def _redirect_tensor_methods() -> None:
    Tensor = torch.Tensor
    to, type_, module_to = Tensor.to, Tensor.type, torch.nn.Module.to

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(self, *map(_to_cpu, args), **{k: _to_cpu(v) for k, v in kwargs.items()})

    def module_to_cpu(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return module_to(self, *map(_to_cpu, args), **{k: _to_cpu(v) for k, v in kwargs.items()})

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return type_(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_(self, dtype, *args, **kwargs)

    Tensor.to = tensor_to  # type: ignore[method-assign, assignment]
    Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(Tensor, name, _on_cpu(getattr(Tensor, name)))
    torch.nn.Module.to = module_to_cpu  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


class _Stream:
    """A CUDA stream's methods, doing nothing: on the CPU everything has happened already."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: Any) -> None: ...


class _Event:
    """A CUDA event's methods; `elapsed_time` is the wall time between two `record`s in ms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time_s = 0.0

    def record(self, stream: Any = None) -> None:
        self._time_s = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end._time_s - self._time_s) * 1000.0

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _DeviceProperties:
    name, major, minor = "cpu", 8, 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = 0


def _constant(value: Any) -> Callable[..., Any]:
    """A new function each time: torch._dynamo's rules forbid one function under two names of torch."""
    return lambda *args, **kwargs: value


def _is_available() -> bool:
    """True only where Megatron asserts that there is a GPU (the assertion's own module is the caller)."""
    return sys._getframe(1).f_globals.get("__name__") in _ASSERTS_CUDA


def _replace_torch_cuda() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {
        "is_available": _is_available,
        "is_initialized": _constant(False),
        "init": _constant(None),
        "current_device": _constant(_CPU),
        "set_device": _constant(None),
        "device_count": _constant(1),
        "device": _constant(nullcontext()),
        "get_device_properties": _constant(_DeviceProperties()),
        "get_device_name": _constant(_DeviceProperties.name),
        "get_device_capability": _constant((_DeviceProperties.major, _DeviceProperties.minor)),
        "Stream": _Stream,
        "Event": _Event,
        "stream": _constant(nullcontext()),
        "current_stream": _constant(stream),
        "default_stream": _constant(stream),
        "set_stream": _constant(None),
        "synchronize": _constant(None),
        "empty_cache": _constant(None),
        "ipc_collect": _constant(None),
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "memory_snapshot": lambda *args, **kwargs: [],
        "reset_peak_memory_stats": _constant(None),
        "mem_get_info": _constant((0, 0)),
        "is_current_stream_capturing": _constant(False),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": _seed,
        "manual_seed_all": lambda seed: _seed(seed),
    }
    counters = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    replacements |= {name: _constant(0) for name in (*counters, "device_memory_used")}
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, replacements[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _constant(None))
    torch.cuda.nvtx.range = _constant(nullcontext())


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would call back
