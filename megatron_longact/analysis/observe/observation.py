"""Measuring a model by context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_longact.analysis.activations.measurement import Measurement, ModelSource, measure, pooled
from megatron_longact.analysis.activations.models import Session
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.observe.outliers import RopeFrequencies, Spread, rope_profile, spreads
from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import Statistic, Tap
from megatron_longact.reporting.run_log import Progress

Length = int | None
"""Tokens of the prompts; None: as a file has them."""


@dataclass(frozen=True)
class Observation:
    """A model's measurements by context length, all tasks together."""

    name: str
    layout: AttentionLayout
    rope: RopeFrequencies | None
    by_length: Mapping[Length, Measurement]
    statistic: Statistic
    ratio: float

    @property
    def longest(self) -> Measurement:
        """The measurement at the longest context: what table, heat maps and verdict are about."""
        return list(self.by_length.values())[-1]

    def spreads(self, measurement: Measurement, tap: Tap, statistic: Statistic | None = None) -> list[Spread]:
        """Of one measurement, the largest outlier ratio first."""
        return spreads(
            measurement.channel_values(tap, statistic or self.statistic, self.layout),
            layout=self.layout,
            ratio=self.ratio,
            rope=self.rope,
        )

    def rope_profiles(self, tap: Tap) -> dict[int, dict[str, Any]]:
        """`rope_profile` of each layer's Q and K: {layer: {"q": [pairs], "k": [pairs]}}; of a model with RoPE."""
        assert self.rope is not None
        turned = [section for section in self.layout.sections if section.rope is not None]
        return {
            layer: {each.name: rope_profile(parts[each.name], section=each, rope=self.rope) for each in turned}
            for layer, parts in self.longest.channel_values(tap, self.statistic, self.layout).items()
        }


def observe(
    source: ModelSource, options: PromptOptions, session: Session, *, statistic: Statistic, ratio: float
) -> Observation:
    """Measure a model on all tasks at each length."""
    progress = Progress(len(options.lengths) * len(options.tasks), session.terminal)
    by_length: dict[Length, Measurement] = {}
    done = 0
    for length in options.lengths:
        parts = []
        for task in options.tasks:
            prompts = options.prompts(source, task=task, length=length)
            parts.append(measure(source, prompts))
            done += 1
            if session.first:
                progress.update(done, {"": f"{task} at {length or 'any'} tokens"})
        by_length[length] = pooled(parts)
    if session.first:
        progress.close()
    rope = None if source.inv_freq is None else RopeFrequencies(source.inv_freq, source.rope_interleaved)
    return Observation(source.name, source.layout, rope, by_length, statistic, ratio)
