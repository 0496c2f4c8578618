"""How much a response repeats itself, in tokens."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_ratio(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams, in (0, 1]; None for fewer than n tokens. Li et al., arXiv 1510.03055."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def longest_loop(tokens: Sequence[int]) -> int:
    """Tokens of the longest stretch that is a block repeated back to back, at least twice in full; 0 if none is.

    A block cut off at the end counts as far as it goes: `a b a b a` is a loop of 5. Quadratic in the length.
    """
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = 0
        for i in range(period, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest


def loop_share(tokens: Sequence[int]) -> float:
    """Share of the tokens that stand in the longest loop; 0 for no tokens."""
    return longest_loop(tokens) / len(tokens) if tokens else 0.0
