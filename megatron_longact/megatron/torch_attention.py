"""Torch's own `scaled_dot_product_attention` in place of Megatron's unfused attention, for the CPU mode.

Megatron's holds [b * np, sq, sk] scores, their mask and their softmax for the backward: 2,048 tokens of a small model
take twice the time and many times the memory. This one never makes scores of a whole packed row either: it goes
through the row's pieces (`attention_plan`), several in one call where that is not more work. Under context parallelism
each rank gathers the keys and values of the row (`context_parallel`).

Shape letters: sq query tokens, sk key tokens, b batch, np/ng query heads/groups, hn channels of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longact.megatron.attention_plan import AttentionPlan, Piece, indices, of_sequences
from megatron_longact.megatron.context_parallel import RowShare

_WASTE = 1.25
"""How much more may be computed than is asked for, to make one call of several."""

_SMALL = 64
"""Tokens beyond that which a call may have in any case."""

_MASKED = -10000.0
"""What Megatron adds to a score that is not to count; not -inf, so that a row of nothing else stays finite."""


@dataclass(frozen=True)
class Call:
    """Some pieces in one call of torch's attention, as rows of equal length.

    queries: int64 [b, sq], the tokens of each row; keys: int64 [b, sk]; mask: bool [sq, sk], True where a query sees a
    key, or None: causal; real: bool [b, sq], False where a row is only filled up.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    real: Tensor


class Calls:
    """The calls that make up a plan, and what to read for them."""

    def __init__(self, plan: AttentionPlan) -> None:
        alone = [piece for piece in plan.pieces if piece.num_keys == piece.num_queries]
        others = [piece for piece in plan.pieces if piece.num_keys > piece.num_queries]
        self.calls = [_side_by_side(pieces) for pieces in _of_like_length(alone)]
        self.calls += [_together(pieces) for pieces in _of_one_context(others)]

    @cached_property
    def queries(self) -> Tensor:
        """Tokens whose queries the calls take, one call behind the other: int64."""
        return torch.cat([call.queries.flatten() for call in self.calls])

    @cached_property
    def keys(self) -> Tensor:
        """Tokens whose keys and values they take: int64."""
        return torch.cat([call.keys.flatten() for call in self.calls])

    @cached_property
    def places(self) -> Tensor:
        """Where among `queries` each token's result stands: int64 [tokens of the row]."""
        real = torch.cat([call.real.flatten() for call in self.calls]).nonzero().flatten()
        return torch.empty_like(real).scatter_(0, self.queries[real], real)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Attention of a row: query [sq, np, hn], key and value [sk, ng, hn] -> [sq, np, hn]."""
        sizes = [call.queries.numel() for call in self.calls], [call.keys.numel() for call in self.calls]
        queries = _select(query, self.queries).split(sizes[0])
        keys, values = (_select(x, self.keys).split(sizes[1]) for x in (key, value))
        outputs = [_attend(*parts, scale=scale) for parts in zip(self.calls, queries, keys, values, strict=True)]
        return _select(torch.cat(outputs), self.places)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """x[index], and x itself where that is the same: sequences of one length are."""
    in_order = len(index) == len(x) and torch.equal(index, torch.arange(len(x)))
    return x if in_order else x.index_select(0, index)


def _attend(call: Call, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """One call: query [b * sq, np, hn], key and value [b * sk, ng, hn] -> [b * sq, np, hn]."""
    b = len(call.queries)
    q, k, v = (x.unflatten(0, (b, -1)).transpose(1, 2) for x in (query, key, value))  # [b, n, s, hn]
    grouped = q.shape[1] != k.shape[1]
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=scale, enable_gqa=grouped
    )
    return output.transpose(1, 2).flatten(0, 1)


def _of_like_length(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are worth being filled up to one length, together."""
    together: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: -piece.num_queries):
        tokens = sum(p.num_queries for p in [*together, piece])
        if together and together[0].num_queries * (len(together) + 1) > _WASTE * tokens + _SMALL:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together


def _side_by_side(pieces: Sequence[Piece]) -> Call:
    """Pieces without a context, longest first, as causal rows; behind a shorter one its last token is repeated."""
    place = torch.arange(pieces[0].num_queries)
    counts = torch.tensor([piece.num_queries for piece in pieces])[:, None]
    within = place.minimum(counts - 1)
    queries, keys = (
        torch.tensor([span[0] for span in spans])[:, None] + within
        for spans in ([piece.queries for piece in pieces], [piece.keys[0] for piece in pieces])
    )
    return Call(queries, keys, None, place < counts)


def _of_one_context(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours behind one context that are worth one call: few of its scores are masked."""
    together: list[Piece] = []
    for piece in pieces:
        joined = [*together, piece]
        keys = joined[0].num_keys + sum(p.num_queries for p in joined[1:])
        fits = all(_context(p) == _context(piece) for p in together)
        if together and not (fits and keys <= _WASTE * max(p.num_keys for p in joined) + _SMALL):
            yield together
            joined = [piece]
        together = joined
    if together:
        yield together


def _context(piece: Piece) -> tuple[Any, ...]:
    """The keys that all queries of a piece see alike."""
    return piece.until(piece.queries[0])


def _together(pieces: Sequence[Piece]) -> Call:
    """Pieces of one context as one row: each query sees the context, and causally its own piece."""
    context = _context(pieces[0])
    count = pieces[0].num_keys - pieces[0].num_queries
    own = [piece.num_queries for piece in pieces]
    seen = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool).tril() for n in own))
    mask = torch.cat([torch.ones(sum(own), count, dtype=torch.bool), seen], dim=1)
    queries = indices([piece.queries for piece in pieces])[None]
    keys = torch.cat([indices(context), *(indices(piece.keys)[-piece.num_queries :] for piece in pieces)])[None]
    return Call(queries, keys, mask, torch.ones_like(queries, dtype=torch.bool))


def replace_attention() -> None:
    """Let Megatron's `DotProductAttention` compute by torch what torch can, and take packed rows.

    Its own stays for dropout, sliding windows, softmax offsets and biases; packed rows and context parallelism raise
    `ValueError` there.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    original = DotProductAttention.forward
    _take_what_only_te_takes(DotProductAttention)

    @wraps(original)
    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any, **kw: Any
    ) -> Tensor:
        packed = kw.pop("packed_seq_params", None)
        packed = packed if packed is not None and packed.qkv_format == "thd" else None
        missing = _what_torch_has_not(self, *rest, **kw)
        parallel = self.config.context_parallel_size > 1
        if parallel and (mask is not None or self.attn_mask_type != AttnMaskType.causal):
            missing = missing or "an attention mask"
        if missing and (packed is not None or parallel):
            what = "context parallelism does" if packed is None else "packed rows do"
            raise ValueError(f"{what} not work on the CPU with {missing}")
        if missing or (mask is None and self.attn_mask_type != AttnMaskType.causal):
            return cast(Tensor, original(self, query, key, value, mask, *rest, **kw))
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        share = _share_of(packed, query, self.pg_collection.cp) if parallel else None
        if share is not None:
            key, value = share.whole(key), share.whole(value)
            mask = share.positions[:, None] < torch.arange(len(key))
        if packed is not None:
            return _calls_of(packed, len(key), share)(query, key, value, scale=scale).flatten(1)
        return attend(query, key, value, mask, scale=scale)

    DotProductAttention.forward = forward
    DotProductAttention.takes_plans = True  # for planned_attention.py


def _what_torch_has_not(
    attention: Any, attn_mask_type: Any = None, attention_bias: Tensor | None = None, **_: Any
) -> str:
    if attention.training and attention.attention_dropout.p:
        return "--attention-dropout"
    if attention.scale_mask_softmax.window_size is not None:
        return "--window-size"
    if attention.softmax_offset is not None:
        return "--softmax-type"
    return "" if attention_bias is None else "an attention bias"


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float) -> Tensor:
    """Causal attention, or that of a mask: query [sq, b, np, hn], key and value [sk, b, ng, hn] -> [sq, b, np * hn].

    mask: bool, broadcast to [b, np, sq, sk], True where a query must not see a key. Fewer queries than keys are the
    last ones, as behind a cache.
    """
    (sq, b, np, _), (sk, _, ng, _) = query.shape, key.shape
    causal = sq > 1 and sq == sk and (mask is None or _is_causal(mask))
    bias: Tensor | None = None
    if mask is not None and not causal:
        bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(mask, _MASKED)
    elif not causal and sq > 1:
        bias = torch.zeros(sq, sk, dtype=query.dtype).masked_fill_(causal_mask(sq, sk), _MASKED)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, s, hn]
    if sq == 1 and bias is None:  # the heads of a group as queries: keys and values are read once
        q = q.reshape(b, ng, np // ng, -1)
    grouped = q.shape[1] != ng
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped)
    return output.reshape(b, np, sq, -1).permute(2, 0, 1, 3).reshape(sq, b, -1)


def causal_mask(sq: int, sk: int) -> Tensor:
    """Bool [sq, sk], True where one of the last `sq` of `sk` tokens must not see a key: it comes later."""
    return torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)


def _is_causal(mask: Tensor) -> bool:
    return mask.shape[:-2].numel() == 1 and torch.equal(mask.view(mask.shape[-2:]), causal_mask(*mask.shape[-2:]))


def _take_what_only_te_takes(attention: Any) -> None:
    """Its constructor refuses context parallelism, and knows no widths of K and V (multi-latent attention)."""
    original = attention.__init__

    @wraps(original)
    def init(
        self: Any, config: Any, *rest: Any, k_channels: int | None = None, v_channels: int | None = None, **kw: Any
    ) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        original(self, alone, *rest, **kw)
        self.config = config
        if v_channels is not None:  # what its own forward shapes the output by
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    attention.__init__ = init


def _share_of(packed: Any, query: Tensor, group: ProcessGroup) -> RowShare:
    """How the row that these queries are a part of is shared, worked out in its first layer if it is packed."""
    total = len(query) * group.size()
    if packed is None:
        return RowShare([0, total], group)
    share: RowShare | None = getattr(packed, "share", None)
    if share is None:
        share = packed.share = RowShare([*_bounds_of(packed), total], group)
    return share


def _calls_of(packed: Any, num_tokens: int, share: RowShare | None) -> Calls:
    """The calls of a packed row, or of this rank's share of it, worked out in its first layer."""
    from megatron_longact.megatron.planned_attention import PlannedSeqParams

    calls: Calls | None = getattr(packed, "_torch_calls", None)
    if calls is None:
        if isinstance(packed, PlannedSeqParams):
            plan = packed.plan  # of the share already
        else:
            plan = of_sequences([*_bounds_of(packed), num_tokens])
            plan = plan if share is None else plan.of(share.spans)
        calls = Calls(plan)
        packed._torch_calls = calls
    return calls


def _bounds_of(packed: Any) -> list[int]:
    bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    return cast(list[int], bounds.tolist())
