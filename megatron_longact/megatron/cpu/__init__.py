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

Devices in torch (devices.py)
    factory functions, `*_like`, `Tensor.to`, `Tensor.new_*`, `Module.to`, `torch.load`
                                    the device "cuda" means the CPU. Wrapped one by one instead of
                                    a `TorchFunctionMode`: a mode is per thread, is off inside
                                    `Tensor.backward` (so in recomputation), and costs time at
                                    every `x.shape`
    `cuda()`, `pin_memory`          identity
    `Tensor.type()`                 Megatron's optimizers sort parameters by the name of their type,
                                    such as "torch.cuda.BFloat16Tensor"

torch.cuda (devices.py)
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

Megatron (replacements.py)
    `datasets.utils.compile_helpers`
                                    skipped where the compiled helper imports, also that of an installed
                                    wheel when Megatron itself is a checkout: ../dataset_helpers.py
    `WrappedTorchNorm`              refuses `--sequence-parallel`; here its weights are marked
                                    `sequence_parallel`, which is what the gradient reduction reads
    `DotProductAttention`           holds the scores of whole rows, and refuses packed ones; here it is torch's
                                    `scaled_dot_product_attention`, piece by piece: torch_attention.py
    `communication_utils._is_cuda`  an assertion of the inference engine, met when pipeline stages
                                    exchange logits
    `maybe_move_tensor_to_cpu`      leaves the all-to-all's split sizes a tensor if they are on the CPU
                                    already; `all_to_all_single` wants numbers
    `moe_utils.te_general_gemm`     in 0.16 a router without Transformer Engine asks for a name that is
                                    not there

Megatron's optimizers in checkpoints (optimizer_checkpoints.py)
    `sharded_state_dict` of all of them
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

import logging
import os
import sys
import warnings

from megatron_longact.megatron.cpu.devices import put_cuda_on_the_cpu
from megatron_longact.megatron.cpu.optimizer_checkpoints import mend_optimizer_checkpoints
from megatron_longact.megatron.cpu.replacements import replace_in_megatron

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

_TRANSFORMER_ENGINE = ("transformer_engine", "transformer_engine_torch")
_APEX = ("apex", "amp_C")
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
    put_cuda_on_the_cpu()
    replace_in_megatron()
    mend_optimizer_checkpoints()


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
