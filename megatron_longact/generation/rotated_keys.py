"""A cache of keys that are rotated once, when they are made.

Megatron's static engine caches keys before RoPE and rotates the whole cache anew for each token (0.19,
`Attention._adjust_key_value_for_inference`; its dynamic engine and flash decoding do it once). RoPE works element by
element: rotated before, the keys are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

_ADJUST = "_adjust_key_value_for_inference"


@contextmanager
def rotated_keys(model: nn.Module) -> Iterator[None]:
    """Self-attention with RoPE caches rotated keys inside the block."""
    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    try:
        for layer in layers:
            setattr(layer, _ADJUST, partial(_rotated, layer, getattr(layer, _ADJUST)))
        yield
    finally:
        for layer in layers:
            vars(layer).pop(_ADJUST, None)


def _rotated(
    layer: Any, adjust: Any, context: Any, query: Tensor, key: Tensor, value: Tensor, rotary: Any, *rest: Any
) -> Any:
    """Megatron's own after the new keys [s, b, ng, hn] are rotated; there is nothing left to do to those it returns."""
    if context is None or rotary is None or not context.is_static_batching() or layer.config.flash_decode:
        return adjust(context, query, key, value, rotary, *rest)
    start = context.sequence_len_offset
    key = apply_rotary_pos_emb(
        key,
        rotary[1][start : start + key.shape[0]],
        config=layer.config,
        mscale=layer._yarn_concentration_factor,
        cp_group=layer.pg_collection.cp,
    )
    query, key, value, (q_rotary, _), *others = adjust(context, query, key, value, rotary, *rest)
    return query, key, value, (q_rotary, None), *others
