"""A model that is trained on parts of sequences, generating with whole ones.

Megatron's static engine has no sequence parallelism (0.19: `NotImplementedError`, but for experts). What splits
sequences are switches on modules and configurations, read in each forward: off, every tensor-parallel rank holds all
tokens between the layers, and the weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Source: megatron/core/transformer/utils.py, `set_model_to_sequence_parallel`, which sets all of them alike."""


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Sequence parallelism is off inside the block, and then what it was, module by module."""
    before = [(each, name, vars(each)[name]) for each in _switched(model) for name in _SWITCHES if name in vars(each)]
    try:
        for each, name, _ in before:
            setattr(each, name, False)
        yield
    finally:
        for each, name, value in before:
            setattr(each, name, value)


def _switched(model: nn.Module) -> list[Any]:
    """The modules, and the configurations that they share."""
    modules = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return [*modules, *configs.values()]
