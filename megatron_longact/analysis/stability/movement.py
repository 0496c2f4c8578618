"""Masks one after another: how far each is from the first one and the one before, and which rows come back. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_longact.analysis.stability.overlap import Choice, jaccard
from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import LongActConfig
from megatron_longact.conversion.plan import table
from megatron_longact.selection import QK, select_masks

SHORTEST = 3
"""Masks from which on a row can have left and come back."""


@dataclass(frozen=True)
class Movement:
    """Of masks in an order, at one hysteresis.

    with_first, with_before: Jaccard overlap of each mask but the first; ever: share of rows that it or one before it
    selected, of each mask. came_back_at_once, came_back: of the rows that left, the share that the next mask selected
    again, and any later one; None where none left. carried: mean part that a mask carries of its own scores, over what
    the highest rows of those scores do; None where scores are not known.
    """

    axis: str
    names: tuple[str, ...]
    hysteresis: float
    with_first: tuple[float, ...]
    with_before: tuple[float, ...]
    ever: tuple[float, ...]
    came_back_at_once: float | None
    came_back: float | None
    carried: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything in numbers."""
        return asdict(self)


def movement(axis: str, choices: Sequence[Choice], *, hysteresis: float = 0.0) -> Movement:
    """Of choices in their order; at least two, of one shape."""
    masks = torch.stack([torch.cat([part.flatten() for part in choice.masks]) for choice in choices])  # [n, rows]
    histories = [choice.history for choice in choices]
    firsts = [_flat(history.first) if history and history.first else masks[0] for history in histories]
    ever = [_flat(history.ever_active) if history else None for history in histories]
    seen = masks.cummax(0).values
    left = masks[:-2] & ~masks[1:-1]
    later = masks.flip(0).cummax(0).values.flip(0)
    return Movement(
        axis=axis,
        names=tuple(choice.name for choice in choices),
        hysteresis=hysteresis,
        with_first=tuple(jaccard(mask, first) for mask, first in zip(masks[1:], firsts[1:], strict=True)),
        with_before=tuple(jaccard(new, old) for old, new in pairwise(masks)),
        ever=tuple(
            float((own if own is not None else listed).double().mean()) for own, listed in zip(ever, seen, strict=True)
        ),
        came_back_at_once=_share(left & masks[2:], left),
        came_back=_share(left & later[2:], left),
    )


def _flat(pair: QK | None) -> Tensor:
    assert pair is not None
    return torch.cat([part.flatten() for part in pair])


def _share(part: Tensor, whole: Tensor) -> float | None:
    return int(part.sum()) / int(whole.sum()) if bool(whole.any()) else None


def with_hysteresis(
    axis: str, choices: Sequence[Choice], *, layout: AttentionLayout, config: LongActConfig, margins: Sequence[float]
) -> list[Movement]:
    """What `--longact-hysteresis` would make of the same scores, one after another; choices: with scores."""
    found = []
    for margin in margins:
        held: list[Choice] = []
        for choice in choices:
            assert choice.scores is not None
            own = replace(config, hysteresis=margin)
            before = held[-1].masks if held else None
            masks = select_masks(choice.scores, layout=layout, config=own, before=before)
            held.append(replace(choice, masks=masks))
        carried = [_carried(choice, best) for choice, best in zip(held, choices, strict=True)]
        found.append(replace(movement(axis, held, hysteresis=margin), carried=sum(carried) / len(carried)))
    return found


def _carried(choice: Choice, best: Choice) -> float:
    assert choice.scores is not None
    scores = torch.cat([part.flatten() for part in choice.scores]).double()
    own, most = (torch.cat([part.flatten() for part in each.masks]) for each in (choice, best))
    return float((scores * own).sum() / (scores * most).sum())


def report(movements: Sequence[Movement]) -> str:
    """A line for each."""
    header = ("masks one after another", "masks", "hysteresis", "with the one before", "last with the first",
              "ever selected", "came back at once", "came back", "carried")  # fmt: skip
    lines = [
        (
            each.axis,
            str(len(each.names)),
            f"{each.hysteresis:g}",
            f"{sum(each.with_before) / len(each.with_before):.3f}",
            f"{each.with_first[-1]:.3f}",
            f"{each.ever[-1]:.1%}",
            *("-" if share is None else f"{share:.1%}" for share in (each.came_back_at_once, each.came_back)),
            "-" if each.carried is None else f"{each.carried:.2%}",
        )
        for each in movements
    ]
    return table(header, lines)
