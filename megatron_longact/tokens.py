"""Which tokens of a micro-batch count in the saliency statistic.

Shape letters: b micro-batch, s sequence in all, sq sequence on this context-parallel rank (s / cp).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRules:
    """What a token must fulfil beyond being named: see `LongActConfig` for the two fields."""

    min_context: int = 0
    skip_first_tokens: int = 0

    @property
    def need_sequences(self) -> bool:
        """Whether the rules ask where sequences begin and how long they are."""
        return self.min_context > 0 or self.skip_first_tokens > 0

    def apply(self, named: Tensor, sequence_ids: Tensor) -> Tensor:
        """Those of the named tokens that fulfil the rules.

        named: bool [b, s]; sequence_ids: int64 [b, s], numbering the sequences of the micro-batch.
        Lengths and positions count named tokens only. Returns bool [b, s].
        """
        if not self.need_sequences:
            return named
        ids, counts = sequence_ids.flatten(), named.flatten().long()
        lengths = torch.zeros(int(ids.max()) + 1, dtype=torch.int64, device=ids.device)
        lengths.scatter_add_(0, ids, counts)
        starts = lengths.cumsum(0) - lengths
        positions = counts.cumsum(0) - 1 - starts[ids]
        counted = (lengths[ids] >= self.min_context) & (positions >= self.skip_first_tokens)
        return named & counted.view_as(named)


def counted_tokens(
    *,
    rules: TokenRules,
    named: Tensor | None,
    packed_seq_params: Any | None,
    padding_mask: Tensor | None,
    cp_rank: int,
    cp_size: int,
) -> Tensor | None:
    """The tokens of this rank's part of a micro-batch that count: bool [sq, b]; None if all do.

    named: bool [b, s], what `LongAct.set_tokens` was given, before context-parallel slicing.
    packed_seq_params: Megatron's `PackedSeqParams` of a `thd` micro-batch ([1, t] tokens).
    padding_mask: bool [b, sq], True at padding, as Megatron's models take it.
    Raises `ValueError` where the rules need sequences and nothing tells them.
    """
    packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
    if packed:
        assert packed_seq_params is not None
        return _packed(rules, named, packed_seq_params, cp_rank=cp_rank, cp_size=cp_size)
    if named is not None:
        rows = torch.arange(named.shape[0], device=named.device)
        counted = rules.apply(named, rows[:, None].expand_as(named))
        return zigzag(counted, cp_rank=cp_rank, cp_size=cp_size).transpose(0, 1)
    if rules.need_sequences and (padding_mask is None or cp_size > 1):
        raise ValueError(
            "--longact-min-context and --longact-skip-first-tokens need to know the sequences: call "
            "LongAct.set_tokens(token_mask) before each forward, or train on packed sequences"
        )
    if padding_mask is None:
        return None
    tokens = ~padding_mask.bool()
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    return rules.apply(tokens, rows[:, None].expand_as(tokens)).transpose(0, 1)


def _packed(rules: TokenRules, named: Tensor | None, packed: Any, *, cp_rank: int, cp_size: int) -> Tensor:
    """`counted_tokens` of a packed micro-batch: bool [t / cp, 1]."""
    lengths = packed.cu_seqlens_q.diff()
    bounds = packed.cu_seqlens_q_padded
    bounds = packed.cu_seqlens_q if bounds is None else bounds
    total = int(bounds[-1]) if named is None else named.numel()
    position = torch.arange(total, device=bounds.device)
    ids = torch.bucketize(position, bounds[1:].to(position.dtype), right=True)
    ends = torch.cat([bounds[:-1] + lengths, bounds.new_zeros(1)])  # what is behind the last is padding
    real = position < ends[ids]
    if named is not None:
        real &= named.flatten()
    counted = rules.apply(real[None], ids[None])[0]
    if cp_size > 1:
        ends_of_parts = [end for end in bounds[1:].tolist() if end < total]
        parts = counted.tensor_split(ends_of_parts)
        counted = torch.cat([zigzag(part[None], cp_rank=cp_rank, cp_size=cp_size)[0] for part in parts])
    return counted[:, None]


def zigzag(tokens: Tensor, *, cp_rank: int, cp_size: int) -> Tensor:
    """A context-parallel rank's part of [b, s]: chunks `r` and `2 cp - 1 - r` of `2 cp`; [b, s / cp].

    Source: megatron/core/utils.py, `get_batch_on_this_cp_rank`.
    """
    if cp_size == 1:
        return tokens
    if tokens.shape[1] % (2 * cp_size):
        raise ValueError(
            f"a token mask over {tokens.shape[1]} tokens does not divide into 2 x {cp_size} context-parallel chunks; "
            "give LongAct.set_tokens the mask of the whole sequences, before Megatron slices them"
        )
    chunks: Sequence[Tensor] = tokens.chunk(2 * cp_size, dim=1)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]], dim=1)
