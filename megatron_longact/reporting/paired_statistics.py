"""Means with Student's t intervals, and how many seeds or prompts would tell a difference from none. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

POWER_Z = 0.8416212
"""Normal quantile of a power of 80 %."""
CONFIDENCE_Z = 1.959964


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds, its 95 % interval, and their standard deviation; the last two need two seeds."""

    n: int
    mean: float
    low: float | None
    high: float | None
    std: float | None


def t_cdf(t: float, df: int) -> float:
    """Student's t distribution function: with x = sqrt(df) tan a its density is cos(a)^(df - 1), up to a constant."""
    steps, end = 400, math.atan(t / math.sqrt(df))
    h = end / steps
    terms = (math.cos(i * h) ** (df - 1) * (1 if i in (0, steps) else 4 if i % 2 else 2) for i in range(steps + 1))
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * h / 3 * sum(terms)


def t_quantile(p: float, df: int) -> float:
    """The t below which a share p lies, for p in [0.5, 0.9995]; by bisection, to 1e-9."""
    low, high = 0.0, 1000.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and t interval."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Mean(n, mean, None, None, None)
    std = statistics.stdev(values)
    half = t_quantile(0.975, n - 1) * std / math.sqrt(n)
    return Mean(n, mean, mean - half, mean + half, std)


def seeds_needed(difference: float, std: float | None) -> int | None:
    """Paired seeds that tell `difference` from zero (5 % two-sided, power 80 %), if they scatter by `std`.

    The smallest n with n >= ((t + z) std / difference)², t of n - 1 degrees; None where nothing can be said: one
    seed, no difference, no scatter, or more than a million.
    """
    if not std or not difference:
        return None
    for n in range(2, 50):
        if n >= ((t_quantile(0.975, n - 1) + POWER_Z) * std / difference) ** 2:
            return n
    n = math.ceil(((CONFIDENCE_Z + POWER_Z) * std / difference) ** 2) + 2  # + 2: t is nearly normal from here on
    return n if n <= 1_000_000 else None


def prompts_needed(difference: float, accuracies: tuple[float, float]) -> int | None:
    """Held-out prompts that tell `difference` points between two models of these accuracies, in percent.

    5 % two-sided, power 80 %, the models' answers taken as independent: answers to the same prompts agree more often,
    so fewer would do. This is the noise of the prompts alone; that of training needs seeds.
    """
    variance = sum(p * (100 - p) for p in accuracies)
    if not difference or not variance:
        return None
    n = math.ceil((CONFIDENCE_Z + POWER_Z) ** 2 * variance / difference**2)
    return n if n <= 1_000_000_000 else None
