"""What Megatron has that needs a GPU, a compiler or kernels, and what stands there instead."""

from __future__ import annotations

import copy
from typing import Any

import torch

from megatron_longact.megatron.dataset_helpers import keep_what_is_built


def replace_in_megatron() -> None:
    """Imports Megatron, which must find the CPU's devices."""
    _replace_rng()
    keep_what_is_built(of_any_megatron=True)
    _replace_norm()
    _replace_inference_assertion()
    _replace_attention()
    _replace_split_sizes()
    _name_missing_gemm()


def _replace_rng() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def _replace_inference_assertion() -> None:
    from megatron.core.inference import communication_utils

    communication_utils._is_cuda = lambda tensor: None


def _replace_norm() -> None:
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


def _name_missing_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
