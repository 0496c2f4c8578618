"""Which tokens of a micro-batch count in the saliency statistic, and how often: a weight a token.

A bool mask is the weights 0 and 1. Shape letters: b micro-batch, s sequence in all, sq sequence on this
context-parallel rank (s / cp). Nothing here waits for a GPU, unless a caller leaves out `total`.
"""

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

    def apply(self, named: Tensor, sequence_ids: Tensor, *, num_sequences: int) -> Tensor:
        """The weights of the named tokens that fulfil the rules, 0 for the others.

        named: weights [b, s]; sequence_ids: int64 [b, s], numbering the sequences of the micro-batch from 0.
        Lengths and positions count named tokens only, each once. Returns weights [b, s] of the dtype of `named`.
        """
        if not self.need_sequences:
            return named
        ids, counts = sequence_ids.flatten(), (named.flatten() > 0).long()
        lengths = torch.zeros(num_sequences, dtype=torch.int64, device=ids.device)
        lengths.scatter_add_(0, ids, counts)
        starts = lengths.cumsum(0) - lengths
        positions = counts.cumsum(0) - 1 - starts[ids]
        counted = (lengths[ids] >= self.min_context) & (positions >= self.skip_first_tokens)
        return torch.where(counted.view_as(named), named, torch.zeros_like(named))

    def apply_to_rows(self, named: Tensor) -> Tensor:
        """The same where each row of `named` is one sequence."""
        rows = torch.arange(named.shape[0], device=named.device)
        return self.apply(named, rows[:, None].expand_as(named), num_sequences=named.shape[0])


def counted_tokens(
    *,
    rules: TokenRules,
    named: Tensor | None,
    packed_seq_params: Any | None,
    padding_mask: Tensor | None,
    cp_rank: int,
    cp_size: int,
    total: int | None = None,
) -> Tensor | None:
    """How often each token of this rank's part of a micro-batch counts: weights [sq, b]; None if all count once.

    named: weights [b, s], what `LongAct.set_tokens` was given, before context-parallel slicing.
    packed_seq_params: Megatron's `PackedSeqParams` of a `thd` micro-batch ([1, t] tokens).
    padding_mask: bool [b, sq], True at padding, as Megatron's models take it.
    total: tokens of a packed micro-batch on all context-parallel ranks, padding included; None: as far as its bounds
    or `named` go. Raises `ValueError` where the rules need sequences and nothing tells them.
    """
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        return _packed(rules, named, packed_seq_params, cp_rank=cp_rank, cp_size=cp_size, total=total)
    if named is not None:
        return zigzag(rules.apply_to_rows(named), cp_rank=cp_rank, cp_size=cp_size).transpose(0, 1)
    if rules.need_sequences and (padding_mask is None or cp_size > 1):
        raise ValueError(
            "--longact-min-context and --longact-skip-first-tokens need to know the sequences: call "
            "LongAct.set_tokens(token_mask) before each forward, or train on packed sequences"
        )
    return None if padding_mask is None else rules.apply_to_rows(~padding_mask.bool()).transpose(0, 1)


def _packed(
    rules: TokenRules, named: Tensor | None, packed: Any, *, cp_rank: int, cp_size: int, total: int | None
) -> Tensor:
    """`counted_tokens` of a packed micro-batch: [t / cp, 1]."""
    lengths = packed.cu_seqlens_q.diff()
    bounds = packed.cu_seqlens_q_padded
    bounds = packed.cu_seqlens_q if bounds is None else bounds
    if named is not None:
        named = named.flatten()
        total = named.numel() if total is None or cp_size > 1 else max(total, named.numel())
        named = torch.nn.functional.pad(named, (0, total - named.numel()))
    elif total is None:
        total = int(bounds[-1])
    ids = _sequence_of(torch.arange(total, device=bounds.device), bounds)
    ends = torch.cat([bounds[:-1] + lengths, bounds.new_zeros(1)])  # what is behind the last is padding
    real = torch.arange(total, device=bounds.device) < ends[ids]
    weights = real if named is None else torch.where(real, named, torch.zeros_like(named))
    weights = rules.apply(weights[None], ids[None], num_sequences=len(bounds))[0]
    if cp_size > 1:
        weights = weights[zigzag_positions(bounds, total, cp_rank=cp_rank, cp_size=cp_size)]
    return weights[:, None]


def _sequence_of(positions: Tensor, bounds: Tensor) -> Tensor:
    return torch.bucketize(positions, bounds[1:].to(positions.dtype), right=True)


def zigzag_positions(bounds: Tensor, total: int, *, cp_rank: int, cp_size: int) -> Tensor:
    """Positions in a row of a context-parallel rank's tokens: `zigzag` of each sequence in it; int64 [t / cp].

    bounds: of its sequences, each a multiple of 2 cp tokens long; total: t, tokens of the row.
    """
    bounds = torch.cat([bounds, bounds.new_full((1,), total)]).long()  # padding behind the last is cut like the others
    local = torch.arange(total // cp_size, device=bounds.device)
    ids = _sequence_of(local * cp_size, bounds)
    starts, lengths = bounds[ids], bounds.diff()[ids]
    offset, half = local - starts // cp_size, lengths // (2 * cp_size)
    first = offset < half
    return torch.where(first, starts + cp_rank * half + offset, starts + (2 * cp_size - 2 - cp_rank) * half + offset)


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
    chunks = tokens.chunk(2 * cp_size, dim=1)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]], dim=1)


def not_padding(tokens: Tensor) -> Tensor:
    """How many of the token ids [b, s] are no padding: a run of one id at either end of a row is; int64 []."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    after = torch.where(tokens != tokens[:, -1:], place, -1).amax(1) + 1  # length of a row without its last run
    before = torch.where(tokens != tokens[:, :1], place, tokens.shape[1]).amin(1)  # length of its first run
    behind = tokens.shape[1] - after
    padding = torch.where(behind > 1, behind, 0) + torch.where((before > 1) & (after > 0), before, 0)
    return tokens.numel() - padding.sum()
