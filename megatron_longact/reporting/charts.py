"""Curves as SVG, drawn in the page's own colours, so that they are readable on a phone and in the dark. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from megatron_longact.reporting.page import Chart

WIDTH, HEIGHT = 380.0, 220.0
"""Of the drawing, in its own units: about pixels on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 36.0
MOST_POINTS = 240
"""Of a curve; of more some are left out, evenly."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Points from left to right; `band`: of each, where its interval begins and ends, or None."""

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float] | None] = field(default=())

    def drawn(self) -> list[tuple[Point, tuple[float, float] | None]]:
        """Points that are numbers, at most `MOST_POINTS` and the last."""
        band = self.band or [None] * len(self.points)
        kept = [pair for pair in zip(self.points, band, strict=True) if all(map(math.isfinite, pair[0]))]
        step = -(-len(kept) // MOST_POINTS) or 1
        return kept[::step] + (kept[-1:] if (len(kept) - 1) % step else [])


def curve(label: str, places: Sequence[float], values: Sequence[float | None]) -> Curve:
    """A curve of the values that are there."""
    return Curve(label, [(place, value) for place, value in zip(places, values, strict=True) if value is not None])


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    along: str,
    percent: bool = False,
    log: bool = False,
    span: tuple[float, float] | None = None,
) -> Chart | None:
    """Curves over one axis; None where there is no point. span: of the values, else as they come; log: their scale."""
    curves = [each for each in curves if each.drawn()]
    if not curves:
        return None
    xs = [point[0] for each in curves for point, _ in each.drawn()]
    ys = [y for each in curves for point, band in each.drawn() for y in (point[1], *(band or ())) if y > 0 or not log]
    x = _Axis.over(xs, LEFT, WIDTH - RIGHT, whole=True)
    y = _Axis.over([*ys, *(span or ())], HEIGHT - BOTTOM, TOP, log=log)
    lines = [part for i, each in enumerate(curves) for part in _drawn(each, x, y, i)]
    svg = [*_grid(x, y, percent=percent), *lines, _text(WIDTH / 2, HEIGHT - 4, along, "middle")]
    told = "; ".join(_told(each, percent=percent) for each in curves)
    return Chart(title, Markup("".join(svg)), f"{title} by {along}: {told}", tuple(each.label for each in curves))


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(
        cls, values: Sequence[float], begin: float, end: float, *, log: bool = False, whole: bool = False
    ) -> _Axis:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log:
            low, high = low / 1.1, high * 1.1
            steps = [10.0**e * m for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                     for m in (1, 2, 5)]  # fmt: skip
            return cls(low, high, begin, end, True, tuple(tick for tick in steps if low <= tick <= high))
        if high == low:
            low, high = low - 0.5, high + 0.5
        step = _step((high - low) / 5)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if not whole:  # the axis ends at numbers
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            low, high = first * step, last * step
        return cls(low, high, begin, end, False, tuple(i * step for i in range(first, last + 1)))

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(each, self.low)) for each in (value, low, high))
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)


def _step(rough: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def _grid(x: _Axis, y: _Axis, *, percent: bool) -> list[Markup]:
    parts = []
    for tick in y.ticks:
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y.at(tick), y.at(tick)))  # fmt: skip
        parts.append(_text(LEFT - 5, y.at(tick) + 4, number(tick, percent=percent), "end"))
    parts += [_text(x.at(tick), HEIGHT - BOTTOM + 15, number(tick), "middle") for tick in x.ticks]
    return parts


def _drawn(each: Curve, x: _Axis, y: _Axis, place: int) -> list[Markup]:
    points = [(x.at(px), y.at(py)) for (px, py), _ in each.drawn()]
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    parts = [Markup('<path class="line c{}" d="{}"/>').format(place % 6, path)]
    for (px, _), band in each.drawn():
        if band is not None:
            parts.append(Markup('<line class="line bar c{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                place % 6, x.at(px), x.at(px), *(y.at(edge) for edge in band)))  # fmt: skip
    if len(points) <= 12:
        parts += [Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(place % 6, *point)
                  for point in points]  # fmt: skip
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def number(value: float, *, percent: bool = False) -> str:
    """A tick's or a table's number: three digits that count, or a percentage."""
    if percent:
        return f"{value * 100:.3g}%"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e7 else f"{value:.3g}"


def _told(each: Curve, *, percent: bool) -> str:
    values = [point[1] for point, _ in each.drawn()]
    first, last, low, high = (number(v, percent=percent) for v in (values[0], values[-1], min(values), max(values)))
    return f"{each.label} from {first} to {last}, between {low} and {high}"
