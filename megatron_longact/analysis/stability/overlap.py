"""How much the selected rows of several choices have in common, against what chance gives. Pure.

Shape letters: n choices, L layers, nq/nk Q/K channels, as in `activations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from megatron_longact.mask_history import MaskHistory
from megatron_longact.selection import QK

STABLE = 0.8
"""Jaccard overlap from which two masks are called the same for practice. Our own bound."""
CARRIES = 0.95
"""Part of the total from which a mask is called as good as the other's own. Our own bound."""


@dataclass(frozen=True)
class Choice:
    """One way to choose: masks, bool Q [L, nq] and K [L, nk], and the scores they were chosen by, if known."""

    name: str
    masks: QK
    scores: QK | None = None
    run: str = ""
    """Which run it is of, if any."""
    history: MaskHistory | None = None
    """Of that run's masks up to here, if known."""


@dataclass(frozen=True)
class Overlap:
    """Every choice of an axis against every other.

    jaccard, chance: fp64 [n, n], rows of all layers together; chance is what two random masks of these sizes have.
    carried: fp64 [n, n], [i, j] the part that mask i carries of what mask j carries of j's own scores, mean over
    layers, Q and K; None where scores are not known. layers: fp64 [2, L], the mean overlap of two choices, Q and K.
    """

    axis: str
    names: tuple[str, ...]
    layer_numbers: tuple[int, ...]
    jaccard: Tensor
    chance: Tensor
    carried: Tensor | None
    layers: Tensor

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.names)), 2))

    @property
    def worst(self) -> tuple[float, str]:
        """The lowest overlap of two choices, and which they are."""
        value, (i, j) = min((float(self.jaccard[pair]), pair) for pair in self._pairs)
        return value, f"{self.names[i]} and {self.names[j]}"

    @property
    def mean(self) -> float:
        """Of all pairs."""
        return sum(float(self.jaccard[pair]) for pair in self._pairs) / len(self._pairs)

    @property
    def mean_chance(self) -> float:
        """What chance gives, mean of all pairs."""
        return sum(float(self.chance[pair]) for pair in self._pairs) / len(self._pairs)

    @property
    def least_carried(self) -> float | None:
        """The lowest of `carried`."""
        return None if self.carried is None else float(self.carried.min())

    def as_json(self) -> dict[str, Any]:
        """Everything in numbers."""
        return {
            "names": self.names,
            "jaccard": self.jaccard.tolist(),
            "chance": self.chance.tolist(),
            "carried": None if self.carried is None else self.carried.tolist(),
            "mean_jaccard": self.mean,
            "mean_chance": self.mean_chance,
            "worst": {"jaccard": self.worst[0], "pair": self.worst[1]},
            "by_layer": {
                "layers": self.layer_numbers,
                "layers_counted_from": 0,
                "q": self.layers[0].tolist(),
                "k": self.layers[1].tolist(),
            },
        }


def overlap(axis: str, choices: Sequence[Choice], layer_numbers: Sequence[int]) -> Overlap:
    """Compare at least two choices; `ValueError` if they are not of models of one shape."""
    assert len(choices) > 1
    shapes = {(tuple(choice.masks.q.shape), tuple(choice.masks.k.shape)) for choice in choices}
    if len(shapes) > 1:
        names = ", ".join(choice.name for choice in choices)
        raise ValueError(f"{names} are not of one shape, Q and K [layers, channels]: {sorted(shapes)}")
    scored = all(choice.scores is not None for choice in choices)
    return Overlap(
        axis=axis,
        names=tuple(choice.name for choice in choices),
        layer_numbers=tuple(layer_numbers),
        jaccard=_matrix(choices, lambda a, b: jaccard(_all(a), _all(b))),
        chance=_matrix(choices, lambda a, b: _chance(a.masks, b.masks)),
        carried=_matrix(choices, _carried) if scored else None,
        layers=_by_layer(choices),
    )


def _matrix(choices: Sequence[Choice], compare: Callable[[Choice, Choice], float]) -> Tensor:
    return torch.tensor([[compare(a, b) for b in choices] for a in choices], dtype=torch.float64)


def jaccard(a: Tensor, b: Tensor) -> float:
    """Rows in both over rows in either, of two bool tensors; 1 if both are empty."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def _all(choice: Choice) -> Tensor:
    return torch.cat([part.flatten() for part in choice.masks])


def _chance(a: QK, b: QK) -> float:
    """Overlap from the expected common rows of random masks with as many rows in each layer's Q and K."""
    common = sum(
        float((x.sum(1, dtype=torch.float64) * y.sum(1, dtype=torch.float64) / x.shape[1]).sum())
        for x, y in zip(a, b, strict=True)
    )
    total = sum(int(part.sum()) for part in (*a, *b))
    return common / (total - common) if total > common else 1.0


def _carried(mask: Choice, other: Choice) -> float:
    """What `mask` carries of the scores of `other`, over what the mask of `other` does."""
    assert other.scores is not None
    shares = []
    for chosen, own, scores in zip(mask.masks, other.masks, other.scores, strict=True):
        carried, of = ((scores.double() * each).sum(1) for each in (chosen, own))
        shares.append(carried[of > 0] / of[of > 0])
    return float(torch.cat(shares).mean())


def _by_layer(choices: Sequence[Choice]) -> Tensor:
    pairs = list(combinations(choices, 2))
    layers = range(len(choices[0].masks.q))
    return torch.tensor(
        [
            [sum(jaccard(a.masks[part][i], b.masks[part][i]) for a, b in pairs) / len(pairs) for i in layers]
            for part in range(2)
        ],
        dtype=torch.float64,
    )


def verdict(overlaps: Sequence[Overlap]) -> str:
    """Would a mask chosen once do? In words, with the numbers; overlaps: of what changes while a model is trained."""
    worst = min(overlaps, key=lambda each: each.worst[0])
    value, pair = worst.worst
    carried = [each.least_carried for each in overlaps if each.least_carried is not None]
    least = min(carried, default=float("inf"))
    lines = [
        f"{_answer(overlaps, least)}: the lowest overlap is {value:.2f} ({worst.axis}: {pair}), where chance gives "
        f"{worst.mean_chance:.2f} and the same rows 1"
    ]
    lines += [f"a mask chosen on one carries at least {least:.1%} of what the other's own does"] * bool(carried)
    lowest = [f"{each.axis} {each.worst[0]:.2f}" for each in overlaps]
    return "; ".join([*lines, f"lowest overlap by axis: {', '.join(lowest)}"])


def _answer(overlaps: Sequence[Overlap], least_carried: float) -> str:
    holds, fails = ([each.axis for each in overlaps if (each.worst[0] >= STABLE) == good] for good in (True, False))
    if not fails:
        return f"a mask chosen once would do over {_and(holds)}"
    if CARRIES <= least_carried < float("inf"):
        return "a mask chosen once would nearly do: the rows that change are near the border"
    return f"a mask chosen once would not do over {_and(fails)}" + (f", but over {_and(holds)}" if holds else "")


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
