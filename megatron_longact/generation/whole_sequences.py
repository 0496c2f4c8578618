"""A model that is trained on parts of sequences, generating with whole ones.

What splits sequences are switches on modules and configurations, read in each forward; the weights are the same.

- Context parallelism: the ranks of a group have the same weights. Off, each of them is a replica with prompts of its
  own, and no engine has to split its KV cache.
- Sequence parallelism: Megatron's static engine has none (0.19: `NotImplementedError`, but for experts). Off, every
  tensor-parallel rank holds all tokens between the layers. The dynamic engine keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import nn

_SEQUENCE_PARALLEL = dict.fromkeys(
    ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings"), False
)
"""Source: megatron/core/transformer/utils.py, `set_model_to_sequence_parallel`, which sets all of them alike."""


@contextmanager
def whole_sequences(model: nn.Module, *, keep_sequence_parallel: bool = False) -> Iterator[None]:
    """Inside the block each rank holds whole sequences; then all is what it was, module by module."""
    off = {} if keep_sequence_parallel else _SEQUENCE_PARALLEL
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    switches: list[tuple[Any, dict[str, Any]]] = [(module, off) for module in modules]
    switches += [(config, off | {"context_parallel_size": 1}) for config in configs.values()]
    switches += [(module, {"cp_group": None}) for module in modules if _reads_cp_group(module)]
    before = [(each, name, vars(each)[name]) for each, names in switches for name in names if name in vars(each)]
    try:
        for each, names in switches:
            vars(each).update({name: value for name, value in names.items() if name in vars(each)})
        yield
    finally:
        for each, name, value in before:
            setattr(each, name, value)


def _reads_cp_group(module: nn.Module) -> bool:
    """RoPE, which cuts its table for the rank, and Transformer Engine's attention."""
    return isinstance(module, RotaryEmbedding) or hasattr(module, "set_context_parallel_group")
