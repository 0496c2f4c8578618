"""Responses of different length side by side in one row: which go together, and the row they make.

Shapes: n responses packed, t tokens of the row, R response tokens. Attention must keep packed sequences apart
(`PackedSeqParams`, thd): Transformer Engine's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def pack(lengths: Sequence[int], *, capacity: int, max_sequences: int, multiple_of: int = 1) -> list[list[int]]:
    """Bins of indices into `lengths`, each of at most `capacity` tokens and `max_sequences` sequences.

    First fit, longest first; then the fullest bins are halved until their number is a multiple of `multiple_of`
    (the replicas that share them). Bins come longest first. Raises ValueError for a length above the capacity and for
    fewer sequences than `multiple_of`.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit in a row of {capacity}")
    if len(lengths) < multiple_of:
        raise ValueError(f"{len(lengths)} sequences cannot be shared by {multiple_of} replicas")
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (b for b, free in enumerate(room) if free >= lengths[index] and len(bins[b]) < max_sequences)
        place = next(fits, len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(index)
        room[place] -= lengths[index]

    def tokens(members: list[int]) -> int:
        return sum(lengths[index] for index in members)

    while len(bins) % multiple_of:
        fullest = max((b for b in bins if len(b) > 1), key=tokens)
        bins.remove(fullest)
        bins += [fullest[::2], fullest[1::2]]
    return sorted(bins, key=tokens, reverse=True)


def packed_row(sequences: Sequence[Tensor], *, length: int, pad_token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, which are real, and bounds of a packed row.

    sequences: int64 [length of each]; length: t, at least their sum. Returns int64 [1, t], int64 [1, t] counted from
    the beginning of each sequence, bool [1, t], and int32 bounds; padding at the end is a sequence of its own.
    """
    lengths = [len(sequence) for sequence in sequences]
    padding = length - sum(lengths)
    bounds = [0, *accumulate([*lengths, padding] if padding else lengths)]
    tokens = torch.cat([*sequences, torch.full((padding,), pad_token, dtype=torch.int64)])
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])
    real = torch.arange(length) < length - padding
    return tokens[None], positions[None], real[None], torch.tensor(bounds, dtype=torch.int32)
