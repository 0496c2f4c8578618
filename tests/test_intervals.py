"""Intervals of scores, against their definitions: no approximation of ours, and the coverage that they claim."""

import itertools
import math

import pytest

from megatron_longact.tasks.intervals import Z, paired_gain, percent_interval, samples_of_mean, wilson


@pytest.mark.parametrize(("right", "n"), [(0, 4), (4, 4), (1, 3), (43, 100), (499, 500)])
def test_wilson_holds_the_shares_that_a_score_test_does_not_reject(right: int, n: int) -> None:
    """Its ends solve |share - p| = Z sqrt(p (1 - p) / n)."""
    share = right / n
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-9)
    assert wilson(0, 4)[1] > 0.4  # none of four right does not say that none ever will be


def test_an_average_is_worth_the_samples_of_its_parts() -> None:
    assert samples_of_mean([32, 32, 32]) == pytest.approx(96)
    assert samples_of_mean([100, 1]) == pytest.approx(4 / 1.01)  # half of it rests on one
    assert percent_interval(100.0, 12) == [75.75, 100.0]
    assert percent_interval(100.01, 12) == [75.75, 100.0]  # rounded averages


@pytest.mark.parametrize(
    "cells",  # of both right, gained, lost, neither
    [(0.4, 0.2, 0.1, 0.3), (0.1, 0.1, 0.1, 0.7), (0.6, 0.05, 0.05, 0.3), (0.05, 0.4, 0.05, 0.5)],
)
def test_the_interval_of_a_gain_covers_it_as_often_as_it_says(cells: tuple[float, ...]) -> None:
    """Summed over every outcome of 16 prompts, with its probability."""
    n, covered = 16, 0.0
    gain = cells[1] - cells[2]
    for both, gained, lost in itertools.product(range(n + 1), repeat=3):
        if (neither := n - both - gained - lost) < 0:
            continue
        counts = (both, gained, lost, neither)
        ways = math.factorial(n) / math.prod(map(math.factorial, counts))
        before = [True] * both + [False] * gained + [True] * lost + [False] * neither
        after = [True] * both + [True] * gained + [False] * lost + [False] * neither
        low, high = paired_gain(before, after)
        covered += (low <= gain <= high) * ways * math.prod(p**c for p, c in zip(cells, counts, strict=True))
    assert 0.93 < covered < 0.999


def test_pairs_that_agree_tell_a_smaller_gain() -> None:
    alike = [i % 2 == 0 for i in range(100)]
    low, high = paired_gain(alike, alike)
    assert low < 0 < high < 0.05
    crossed = paired_gain(alike, [not each for each in alike])
    assert crossed[1] - crossed[0] > 4 * (high - low)
