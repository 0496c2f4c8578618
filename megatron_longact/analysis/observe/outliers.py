"""How far the Q and K channels of a layer are from alike: outliers, what they carry, and where RoPE turns them. Pure.

Shape letters as in `activations`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from megatron_longact.analysis.activations.measurement import ChannelValues, rope_pair
from megatron_longact.attention_layout import AttentionLayout, Section
from megatron_longact.conversion.plan import table
from megatron_longact.selection import num_selected

OUTLIER, MILD = 5.0, 3.0
"""Times the median of its layer's Q (or K): from here on a channel is an outlier, or a mild one. Our own bounds."""


@dataclass(frozen=True)
class RopeFrequencies:
    """RoPE of a model: inverse frequencies, radians a token, fp32 [pairs]."""

    inv_freq: Tensor
    interleaved: bool = False

    @property
    def wavelengths(self) -> list[float]:
        """Tokens in which a pair of channels turns once."""
        return [float(2 * pi / each) for each in self.inv_freq]

    def pair(self, channel: int, section: Section) -> int | None:
        """The frequency of a channel of a head, as an index into `inv_freq`; None outside the rotary part."""
        if section.rope is None or channel < section.rope:
            return None
        return rope_pair(channel - section.rope, len(self.inv_freq), interleaved=self.interleaved)


@dataclass(frozen=True)
class Spread:
    """The channels of Q, or of K, of one layer.

    outlier_ratio: largest over median. top_share: part of the sum that the largest `ratio` of the channels carry; all
    alike would carry `ratio`. outliers: channels of `OUTLIER` times the median or more. head, channel, wavelength: of
    the largest.
    """

    layer: int
    part: str
    outlier_ratio: float
    top_share: float
    outliers: int
    channels: int
    median: float
    head: int
    channel: int
    wavelength: float | None


def spreads(
    values: ChannelValues, *, layout: AttentionLayout, ratio: float, rope: RopeFrequencies | None
) -> list[Spread]:
    """One for each layer's Q and K, the largest outlier ratio first."""
    found = [
        _spread(layer, section, parts[section.name], ratio=ratio, rope=rope)
        for layer, parts in values.items()
        for section in layout.sections
    ]
    return sorted(found, key=lambda each: (-each.outlier_ratio, each.layer, each.part))


def _spread(layer: int, section: Section, scores: Tensor, *, ratio: float, rope: RopeFrequencies | None) -> Spread:
    """scores: fp32 [channels]."""
    relative = over_median(scores)
    top = scores.sort(descending=True).values[: num_selected(ratio, len(scores))]
    head, channel = divmod(int(scores.argmax()), section.width)
    pair = None if rope is None else rope.pair(channel, section)
    return Spread(
        layer=layer,
        part=section.name,
        outlier_ratio=float(relative.max()),
        top_share=float(top.double().sum() / scores.double().sum()),
        outliers=int((relative >= OUTLIER).sum()),
        channels=len(scores),
        median=float(scores.float().quantile(0.5)),
        head=head,
        channel=channel,
        wavelength=None if rope is None or pair is None else rope.wavelengths[pair],
    )


def over_median(scores: Tensor) -> Tensor:
    """Each channel's score in units of the median channel's: [channels] -> [channels]."""
    smallest = torch.finfo(torch.float32).tiny
    return scores.float() / scores.float().quantile(0.5).clamp_min(smallest)


def rope_profile(scores: Tensor, *, section: Section, rope: RopeFrequencies) -> Tensor:
    """The largest channel at each RoPE frequency over the median of all: [heads * hn] -> fp32 [pairs]."""
    relative = over_median(scores).view(-1, section.width).amax(0)  # [heads, hn] -> [hn]
    profile = torch.zeros(len(rope.inv_freq))
    for channel, value in enumerate(relative):
        pair = rope.pair(channel, section)
        if pair is not None:
            profile[pair] = torch.maximum(profile[pair], value)
    return profile


def spread_table(rows: Sequence[Spread], *, ratio: float, after_norm: Mapping[tuple[int, str], Spread]) -> str:
    """The rows in words and numbers; after_norm: by layer and part, those of the tap behind q/k-layernorm."""
    header = [
        "layer, from 0",
        "max/median",
        f"top {percent(ratio)} carry",
        f"{OUTLIER:g}x or more",
        "head",
        "channel",
        "wavelength",
    ]
    header += ["after qk-norm"] * bool(after_norm)
    lines = []
    for row in rows:
        wavelength = "-" if row.wavelength is None else f"{row.wavelength:.3g} tokens"
        cells = [f"{row.layer} {row.part.upper()}", f"{row.outlier_ratio:.2f}", f"{row.top_share:.1%}"]
        cells += [f"{row.outliers} of {row.channels}", str(row.head), str(row.channel), wavelength]
        cells += [f"{after_norm[row.layer, row.part].outlier_ratio:.2f}"] if after_norm else []
        lines.append(cells)
    return table(header, lines)


def verdict(name: str, rows: Sequence[Spread], *, ratio: float) -> str:
    """Whether a model has outliers, in a sentence with its numbers; rows: of the projection's output."""
    first = max(rows, key=lambda each: each.outlier_ratio)
    with_outliers = sum(each.outliers > 0 for each in rows)
    place = f"head {first.head}, channel {first.channel}"
    place += "" if first.wavelength is None else f", RoPE wavelength {first.wavelength:.3g} tokens"
    shares = sorted(each.top_share for each in rows)
    count = sum(each.outliers for each in rows)
    return (
        f"{name} {_grade(first.outlier_ratio)}: the largest channel is {first.outlier_ratio:.1f} times the median in "
        f"layer {first.layer} {first.part.upper()} ({place}); {with_outliers} of the {len(rows)} Q and K projections "
        f"have channels of {OUTLIER:g} times their median or more, {count} channels in all; the top {percent(ratio)} "
        f"of the channels carry {shares[0]:.0%} to {shares[-1]:.0%} of the total ({percent(ratio)} if all were alike)"
    )


def percent(ratio: float) -> str:
    """A share with the digits that it was given."""
    return f"{100 * ratio:g}%"


def _grade(outlier_ratio: float) -> str:
    if outlier_ratio >= OUTLIER:
        return "has outliers"
    return "has mild outliers" if outlier_ratio >= MILD else "has no outliers"
