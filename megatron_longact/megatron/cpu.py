"""Megatron-core 0.19 and its `megatron.training` on a machine without a GPU.

`enable_cpu_mode()` makes this process run Megatron on the CPU over gloo. It is for the quick start,
for CI and for reading the numbers; it is applied only when asked for, and nothing else in the
package imports it. What it changes, and why:

Environment
    CUDA_VISIBLE_DEVICES=""         a GPU that is there must not be initialised by accident
    CUDA_DEVICE_MAX_CONNECTIONS=1   Megatron's arguments ask for it as soon as TP > 1
    TORCHDYNAMO_DISABLE=1           `jit_fuser` is `torch.compile`: minutes, and a C++ compiler
    transformer_engine, apex        hidden from import: their kernels need a GPU, and Megatron takes
                                    their norms and their Adam wherever it finds them. With
                                    `transformer_engine=True` that one stays, for tests of its modules

What is not shown
    "Transformer Engine and Apex are not installed", "No CUDA runtime is found"
                                    warnings of what is meant to be so

Devices in torch
    factory functions, `*_like`, `Tensor.to`, `Tensor.new_*`, `Module.to`, `torch.load`
                                    the device "cuda" means the CPU. Wrapped one by one instead of
                                    a `TorchFunctionMode`: a mode is per thread, is off inside
                                    `Tensor.backward` (so in recomputation), and costs time at
                                    every `x.shape`
    `cuda()`, `pin_memory`          identity
    `Tensor.type()`                 Megatron's optimizers sort parameters by the name of their type,
                                    such as "torch.cuda.BFloat16Tensor"

torch.cuda
    `is_available`                  True where Megatron asserts it (`megatron.training.initialize`) and
                                    where Transformer Engine does (`transformer_engine.pytorch.module.base`),
                                    False for everybody else
    `current_device`                the CPU, because it is passed on as `device=`
    `device_count`                  1: with 0 Megatron does not seed its random-number tracker
    devices, streams, events, memory counters, nvtx
                                    stand-ins that do nothing; events measure wall time
    `manual_seed`, `get_rng_state`, `set_rng_state`
                                    the CPU's generator, so that initialisation and dropout draw from
                                    Megatron's tracker. `_get_cuda_rng_state`, `_set_cuda_rng_state`
                                    of `tensor_parallel.random` reach past `torch.cuda`, so they too

Megatron
    `datasets.utils.compile_helpers`
                                    runs `make` in a folder whose Makefile the wheel lacks; skipped
                                    where the compiled helper imports, also that of an installed wheel
                                    when Megatron itself is a checkout
    `WrappedTorchNorm`              refuses `--sequence-parallel`; here its weights are marked
                                    `sequence_parallel`, which is what the gradient reduction reads
    `DotProductAttention`           holds the scores of whole rows, and refuses packed ones; here it is torch's
                                    `scaled_dot_product_attention`, piece by piece: torch_attention.py
    `communication_utils._is_cuda`  an assertion of the inference engine, met when pipeline stages
                                    exchange logits
    `maybe_move_tensor_to_cpu`      leaves the all-to-all's split sizes a tensor if they are on the CPU
                                    already; `all_to_all_single` wants numbers
    optimizers' `sharded_state_dict`
                                    torch's Adam and SGD make their state in the first step: before
                                    it a load has nothing to load into (an assertion on `step`, or
                                    lost momentum), nor has a save after skipped steps only. The state
                                    is made first, without `_init_optimizer_states_with_dummy_values`,
                                    whose step decays the weights and runs the step hooks. For SGD
                                    Megatron has no `init_state_fn`, and calls it all the same
    `load_state_dict` of the other optimizers
                                    a common step of 0 is left out of the checkpoint: put it back
    `DistributedOptimizer._set_main_param_and_optimizer_states`
                                    takes torch's `step` for a sharded tensor: a `KeyError` in one
                                    checkpoint format, a step of 0 in another; and writes to fp32
                                    shards, which are views of the parameters, without `no_grad`
    `DistributedOptimizer.load_state_dict`
                                    leaves one `step` tensor that all parameters share, so that each
                                    step would count once a parameter

`CPU_MODE_FLAGS` are the Megatron flags that go with it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

CPU_MODE_FLAGS: list[str] = [
    "--distributed-backend=gloo",
    "--use-cpu-initialization",
    "--transformer-impl=local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-persist-layer-norm",
]
"""Megatron flags that a CPU run needs, one element a flag."""

_CPU = torch.device("cpu")
_TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
_APEX = ("apex", "amp_C")
_ASSERTS_CUDA = ("megatron.training.initialize", "transformer_engine.pytorch.module.base")
_enabled = False


def enable_cpu_mode(*, transformer_engine: bool = False) -> None:
    """Make this process run Megatron on the CPU (see the module's docstring); a second call does nothing.

    Call it before the first import of `megatron`, which it imports itself. Lasts as long as the process.
    transformer_engine: leave it to be found. Its modules can be built then; whoever runs them brings the kernels.
    """
    global _enabled
    if _enabled:
        return
    _enabled = True
    _set_environment()
    _hide(_APEX if transformer_engine else (*_TRANSFORMER_ENGINE, *_APEX))
    _silence_what_is_meant()
    _redirect_factories()
    _redirect_tensor_methods()
    _replace_torch_cuda()
    _replace_rng()
    _replace_dataset_compilation()
    _replace_norm()
    _replace_inference_assertion()
    _replace_attention()
    _replace_split_sizes()
    _replace_optimizer_checkpointing()


def missing_cpu_flags(argv: list[str]) -> list[str]:
    """Those of `CPU_MODE_FLAGS` that `argv` does not give itself, with whatever value."""
    given = {argument.split("=", 1)[0] for argument in argv}
    return [flag for flag in CPU_MODE_FLAGS if flag.split("=", 1)[0] not in given]


def _set_environment() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True


def _hide(modules: tuple[str, ...]) -> None:
    for name in modules:
        sys.modules[name] = None  # type: ignore[assignment]


def _silence_what_is_meant() -> None:
    missing = r".*(Transformer Engine|transformer-engine|Apex)"
    warnings.filterwarnings("ignore", message=missing, category=UserWarning, module=r"megatron\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


# --- devices -----------------------------------------------------------------------------------------------------


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


# --- torch.cuda --------------------------------------------------------------------------------------------------


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


# --- Megatron ----------------------------------------------------------------------------------------------------


def _replace_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _replace_dataset_compilation() -> None:
    from megatron.core.datasets import utils

    compile_helpers = utils.compile_helpers

    def compile_unless_there() -> None:
        if not _import_dataset_helper():
            compile_helpers()

    utils.compile_helpers = compile_unless_there


def _import_dataset_helper() -> bool:
    from megatron.core import datasets

    here = list(datasets.__path__)
    datasets.__path__ = [*here, *(os.path.join(folder, "megatron", "core", "datasets") for folder in sys.path)]
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return False
    finally:
        datasets.__path__ = here
    return True


def _replace_inference_assertion() -> None:
    from megatron.core.inference import communication_utils

    communication_utils._is_cuda = lambda tensor: None


def _replace_norm() -> None:
    import copy

    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    new = WrappedTorchNorm.__new__

    def new_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = new(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new_marked


def _replace_attention() -> None:
    from megatron_longact.megatron.torch_attention import replace_attention

    replace_attention()


def _replace_split_sizes() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def _replace_optimizer_checkpointing() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for cls in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        _make_state_before(cls, "sharded_state_dict")
    for cls in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        _step_zero_before(cls, "load_state_dict")
    _keep_step_within(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    _own_step_after(DistributedOptimizer, "load_state_dict")


def _make_state_before(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer:
            _make_state(self.optimizer)
            self.init_state_fn = self.init_state_fn or _constant(None)
        return method(self, *args, **kwargs)

    setattr(cls, name, call)


def _make_state(inner: torch.optim.Optimizer) -> None:
    """Give every parameter of torch's Adam(W) or SGD the state that its first step would begin with."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if isinstance(inner, torch.optim.SGD) and group["momentum"] and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _step_zero_before(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("optimizer", state_dict)["state"]
        adam = [state for state in states.values() if isinstance(state, dict) and "exp_avg" in state]
        if "common_step" not in states and any("step" not in state for state in adam):
            states["common_step"] = torch.tensor(0.0, dtype=torch.float32)
        method(self, state_dict)

    setattr(cls, name, call)


def _keep_step_within(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        with torch.no_grad():
            method(self, model_param, tensors | {k: state[k] for k in ("step",) if k in state})

    setattr(cls, name, call)


def _own_step_after(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, state_dict: dict[str, Any]) -> None:
        method(self, state_dict)
        for state in [] if self.is_stub_optimizer else self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    setattr(cls, name, call)
