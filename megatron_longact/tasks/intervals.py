"""How far a score can be off because so few samples were asked: Wilson's score interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Normal quantile of 95 %, two-sided."""
METHOD = "95 % Wilson score interval over the samples"
NOTE = f"(low-high): {METHOD}; for scores that can be partly right it is on the wide side"

Interval = tuple[float, float]


def wilson(share: float, n: float) -> Interval:
    """In [0, 1], of a mean of n samples in [0, 1]; Wilson 1927, in JASA 22, 209-212.

    Right and wrong scatter most of all that has this mean (their variance is share * (1 - share)), so scores in between
    are nowhere further off. It says something also where all are right or all are wrong.
    """
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_gain(before: Sequence[bool], after: Sequence[bool]) -> Interval:
    """Of the difference after - before of the shares that are right, in [-1, 1], of answers to the same questions.

    Newcombe's hybrid score interval for paired proportions: Statistics in Medicine 17 (1998), 2635-2650, method 10.
    """
    n = len(before)
    old, new = sum(before) / n, sum(after) / n
    (old_low, old_high), (new_low, new_high) = wilson(old, n), wilson(new, n)
    r = _correlation(before, after)

    def far(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * r * a * b + b**2))

    return new - old - far(new - new_low, old_high - old), new - old + far(new_high - new, old - old_low)


def _correlation(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Of right and wrong answers, drawn towards 0 by half an answer where it is positive, as method 10 has it."""
    n, old, new = len(before), sum(before), sum(after)
    both = sum(a and b for a, b in zip(before, after, strict=True))
    margins = old * (n - old) * new * (n - new)
    difference: float = both * (n - old - new + both) - (old - both) * (new - both)
    difference = max(0, difference - n / 2) if difference > 0 else difference
    return difference / math.sqrt(margins) if margins else 0.0


def percent_interval(score: float, n: float) -> list[float]:
    """The interval of a score in percent, with two decimals."""
    return [round(100 * end, 2) for end in wilson(min(max(score / 100, 0.0), 1.0), n)]


def samples_of_mean(counts: Sequence[int]) -> float:
    """Samples that the plain mean of several means is worth, each over so many: their variances add up."""
    return len(counts) ** 2 / sum(1 / count for count in counts)


def with_interval(text: str, interval: Sequence[float] | None) -> str:
    """A figure of a table in percent, with its interval behind it."""
    return text if interval is None else f"{text} ({interval[0]:.0f}-{interval[1]:.0f})"
