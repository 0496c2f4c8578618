"""Responses of different length side by side in one row: which go together, and the row they make.

Prompts that several responses have in common are in a row once (`pack_groups`, segments.py), or with each.

Shapes: n responses packed, t tokens of the row, R response tokens. Attention must keep packed sequences apart
(`PackedSeqParams`, thd): Transformer Engine's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


def pack(lengths: Sequence[int], *, capacity: int, max_sequences: int, multiple_of: int = 1) -> list[list[int]]:
    """Bins of indices into `lengths`, each of at most `capacity` tokens and `max_sequences` sequences.

    First fit, longest first; then the fullest bins are halved until their number is a multiple of `multiple_of`
    (the replicas that share them). Bins come longest first. Raises ValueError for a length above the capacity and for
    more bins than sequences, which a number of sequences that is a multiple of `multiple_of` never needs.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit in a row of {capacity}")
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
        fullest = max((b for b in bins if len(b) > 1), key=tokens, default=None)
        if fullest is None:
            raise ValueError(f"{len(lengths)} sequences cannot be shared by {multiple_of} replicas")
        bins.remove(fullest)
        bins += [fullest[::2], fullest[1::2]]
    return sorted(bins, key=tokens, reverse=True)


def pack_groups(
    groups: Sequence[Sequence[int]],
    *,
    prompts: Sequence[int],
    lengths: Sequence[int],
    capacity: int,
    max_sequences: int,
    multiple_of: int = 1,
) -> list[list[int]]:
    """Bins of responses, of at most `capacity` tokens where each prompt counts once a bin, and of like size.

    groups: the responses that have a prompt in common, each response in one; prompts, lengths: tokens of each
    response's prompt and of itself. There are as few bins as hold them, a multiple of `multiple_of`; a group is cut
    where it is too long for one, or where there are fewer groups than bins. Bins come longest first, and in them the
    responses of a group side by side. Raises ValueError as `pack` does.
    """

    def tokens(members: Sequence[int]) -> int:
        return prompts[members[0]] + sum(lengths[index] for index in members)

    def fits(bin: Sequence[Sequence[int]]) -> bool:
        return sum(map(tokens, bin)) <= capacity and sum(map(len, bin)) <= max_sequences

    whole = [list(group) for group in groups]
    longest = max((tokens([index]) for group in whole for index in group), default=0)
    if longest > capacity:
        raise ValueError(f"a sequence of {longest} tokens does not fit in a row of {capacity}")
    number = {index: place for place, group in enumerate(whole) for index in group}
    parts = [part for group in whole for part in _cut(group, fits)]
    count = round_up(-(-sum(map(tokens, parts)) // capacity), multiple_of)
    while True:
        while len(parts) < count:
            largest = max((part for part in parts if len(part) > 1), key=tokens, default=None)
            if largest is None:
                raise ValueError(f"{len(number)} sequences cannot be shared by {multiple_of} replicas")
            parts.remove(largest)
            parts += [largest[::2], largest[1::2]]
        bins = _evenly(sorted(parts, key=tokens, reverse=True), count, tokens=tokens, fits=fits)
        if bins is not None:
            return [sorted((i for part in bin for i in part), key=lambda i: (number[i], i)) for bin in bins]
        count += multiple_of


def _cut(members: list[int], fits: Callable[[Sequence[Sequence[int]]], bool]) -> list[list[int]]:
    """Parts of a group that fit in a bin."""
    if fits([members]):
        return [members]
    return [part for half in (members[::2], members[1::2]) for part in _cut(half, fits)]


def _evenly(
    parts: Sequence[list[int]],
    count: int,
    *,
    tokens: Callable[[Sequence[int]], int],
    fits: Callable[[Sequence[Sequence[int]]], bool],
) -> list[list[list[int]]] | None:
    """The parts, longest first, each into the emptiest of `count` bins that it fits in; None where there is none."""
    bins: list[list[list[int]]] = [[] for _ in range(count)]
    for part in parts:
        emptiest = min((bin for bin in bins if fits([*bin, part])), key=lambda b: sum(map(tokens, b)), default=None)
        if emptiest is None:
            return None
        emptiest.append(part)
    return sorted(bins, key=lambda b: -sum(map(tokens, b)))


def round_up(length: int, multiple_of: int) -> int:
    """The smallest multiple that is at least `length`."""
    return -(-length // multiple_of) * multiple_of


def packed_row(
    sequences: Sequence[Tensor], *, length: int, pad_token: int, multiple_of: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions, which are real, and bounds of a packed row.

    sequences: int64 [length of each], filled up to a multiple of `multiple_of`; length: t, at least the sum of that.
    Returns int64 [1, t], int64 [1, t] counted from the beginning of each sequence, bool [1, t], and int32 bounds;
    padding at the end is a sequence of its own.
    """
    filled = [round_up(len(sequence), multiple_of) for sequence in sequences]
    padding = length - sum(filled)
    bounds = [0, *accumulate([*filled, padding] if padding else filled)]
    tokens = torch.full((length,), pad_token, dtype=torch.int64)
    real = torch.zeros(length, dtype=torch.bool)
    for begin, sequence in zip(bounds, sequences, strict=False):
        tokens[begin : begin + len(sequence)] = sequence
        real[begin : begin + len(sequence)] = True
    positions = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])
    return tokens[None], positions[None], real[None], torch.tensor(bounds, dtype=torch.int32)
