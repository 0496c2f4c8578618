"""Rows whose attention follows an `AttentionPlan`, through Megatron's own modules.

To Megatron such a row is one packed sequence (thd) of t tokens: RoPE reads row i of its table for token i, so the table
is gathered by position before that, and context parallelism cuts the row as it cuts a sequence. `SelfAttention` hands
the `PackedSeqParams` on to `core_attention`, where the plan is read: in the CPU mode by `torch_attention`, on a GPU by
a hook that turns the row into one variable-length call of Transformer Engine.

Shape letters: t tokens of a row, np/ng query heads/groups, hn channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_longact.megatron.attention_plan import AttentionPlan
from megatron_longact.megatron.context_parallel import RowShare


class PlannedSeqParams(PackedSeqParams):
    """One sequence of t tokens, and the plan of its attention: of this rank's part of it if the row is shared."""

    def __init__(self, plan: AttentionPlan, *, device: torch.device, share: RowShare | None = None) -> None:
        t = plan.num_queries
        bounds = torch.tensor([0, t], dtype=torch.int32, device=device)
        super().__init__(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=t, max_seqlen_kv=t)
        self.plan = plan if share is None else plan.of(share.spans)
        self.share = share

    @cached_property
    def key_index(self) -> Tensor:
        """The keys of the variable-length call: int64, on the device of the row."""
        assert self.cu_seqlens_q is not None
        return self.plan.key_index.to(self.cu_seqlens_q.device)

    @cached_property
    def of_pieces(self) -> PackedSeqParams:
        """What Transformer Engine is told of the pieces."""
        assert self.cu_seqlens_q is not None
        queries, keys = (bounds.to(self.cu_seqlens_q.device) for bounds in self.plan.bounds)
        longest_query, longest_key = self.plan.longest
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=queries,
            cu_seqlens_kv=keys,
            max_seqlen_q=longest_query,
            max_seqlen_kv=longest_key,
            local_cp_size=None if self.share is None else 1,  # keys and values are there: no context parallelism
        )


class MaskType(Enum):
    """Transformer Engine's name of the mask, which Megatron's `AttnMaskType` has not: it passes names on."""

    padding_causal_bottom_right = "padding_causal_bottom_right"


def take_plans(chunks: Iterable[nn.Module]) -> None:
    """Let Transformer Engine's `core_attention` of model chunks follow the plans that rows come with."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if name.endswith("core_attention") and not takes_plans(module):
                module.register_forward_pre_hook(_gather_keys, with_kwargs=True)
                if getattr(module, "cp_group", None) is not None:
                    module.register_forward_hook(_ContextParallelAgain(module), with_kwargs=True, always_call=True)


def takes_plans(core_attention: nn.Module) -> bool:
    """Whether it reads plans by itself: that of the CPU mode does."""
    return getattr(core_attention, "takes_plans", False)


def _gather_keys(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Query [t, np, hn] stays; key and value [t, ng, hn] become those of the pieces, [their keys, ng, hn].

    The backward of the gather adds up the gradient of a key that several pieces see. Under context parallelism keys and
    values of the whole row are put together before.
    """
    packed = kwargs.get("packed_seq_params")
    if not isinstance(packed, PlannedSeqParams):
        return None
    query, key, value, *rest = args
    if packed.share is not None:
        key, value = packed.share.whole(key), packed.share.whole(value)
    key, value = (x.index_select(0, packed.key_index) for x in (key, value))
    planned = {"packed_seq_params": packed.of_pieces, "attn_mask_type": MaskType.padding_causal_bottom_right}
    return (query, key, value, *rest), kwargs | planned


class _ContextParallelAgain:
    """Takes back what Megatron's attention does for `local_cp_size` 1, and leaves so: no context parallelism."""

    def __init__(self, module: Any) -> None:
        self._group = (module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        packed = kwargs.get("packed_seq_params")
        if packed is not None and packed.local_cp_size == 1:
            module.set_context_parallel_group(*self._group)


@contextmanager
def rope_by_position(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside, row i of the RoPE table that a model makes for itself is that of `positions[i]`: int64 [t].

    model: a GPTModel, unwrapped; its table must reach the largest position, as that of a row of t tokens does.
    """

    def gather(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        table, *rest = output if isinstance(output, tuple) else (output,)  # YaRN's comes with a factor
        gathered = table.index_select(0, positions)
        return (gathered, *rest) if rest else gathered

    rope = getattr(model, "rotary_pos_emb", None)
    if rope is None:
        yield
        return
    handle = rope.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
