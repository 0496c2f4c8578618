"""Statistics of Q and K activations of a whole model on given prompts, whichever program the model runs in.

Shape letters: L layers, np/ng query heads/groups, hn kv_channels, nq = np * hn, nk = ng * hn. Channels are numbered
head by head, as in `QKVLayout`. Pure; the models are in `hf` and `megatron`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import torch
from torch import Tensor

from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import Statistic, Tap
from megatron_longact.reduction import STATISTICS
from megatron_longact.selection import QK
from megatron_longact.tasks.chat import ChatTemplate

TAPS: tuple[Tap, ...] = get_args(Tap)

ChannelValues = dict[int, dict[str, Tensor]]
"""By layer number, from 0 as in Hugging Face's names, then by section: "q" [np * hn] and "k" [ng * hn]."""


@dataclass(frozen=True)
class Measurement:
    """All statistics of all channels over one set of prompts.

    tokens: how many were counted. scores: fp32 Q [L, nq] and K [L, nk] by tap and statistic; a model without
    q/k-layernorm has the tap "projection" only.
    """

    tokens: int
    layer_numbers: tuple[int, ...]
    """From 0, as in Hugging Face's names; Megatron's own begin at 1."""
    scores: Mapping[tuple[Tap, Statistic], QK]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where activations were read."""
        return tuple(tap for tap in TAPS if any(tap == each for each, _ in self.scores))

    def channel_values(self, tap: Tap, statistic: Statistic, layout: AttentionLayout) -> ChannelValues:
        """One statistic layer by layer."""
        return by_layer(self.scores[tap, statistic], self.layer_numbers, layout)


def by_layer(values: QK, layer_numbers: Sequence[int], layout: AttentionLayout) -> ChannelValues:
    """Q [L, nq] and K [L, nk] as {layer: {"q": [nq], "k": [nk]}}, or by the sections that the layout has."""
    return {number: layout.by_section(*(part[i] for part in values)) for i, number in enumerate(layer_numbers)}


class ModelSource(Protocol):
    """A model whose Q and K activations can be read, with its tokenizer.

    taps: where; inv_freq: RoPE's inverse frequencies, radians a token, fp32 [pairs], channel i paired with i + pairs,
    or with i + 1 where `rope_interleaved`; None without RoPE. positions: tokens that the model takes;
    embeddings: ids that it has embeddings of, None if that is not known.
    """

    name: str
    layout: AttentionLayout
    layer_numbers: tuple[int, ...]
    taps: tuple[Tap, ...]
    inv_freq: Tensor | None
    rope_interleaved: bool
    positions: int
    embeddings: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def chat_template(self) -> ChatTemplate | None:
        """The tokenizer's, if it has one."""
        ...

    def measure(self, prompts: Sequence[Sequence[int]]) -> Measurement:
        """Run the prompts, each by itself, and return the statistics over all their tokens.

        Collective over the ranks of a Megatron model, and the same on all. Raises `ValueError` for no prompts, an
        empty one, and activations that are not finite.
        """
        ...


def measure(model: ModelSource, prompts: Sequence[Sequence[int]]) -> Measurement:
    """fp32 mean-abs, rms and max-abs of every Q and K channel of every layer, at each tap the model has."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens, to measure"
        )
    largest = max(map(max, prompts))
    if model.embeddings is not None and largest >= model.embeddings:
        raise ValueError(f"a prompt has the token id {largest}, but the model has {model.embeddings} embeddings")
    measured = model.measure(prompts)
    for (tap, statistic), scores in measured.scores.items():
        for part, values in scores._asdict().items():
            bad = ~torch.isfinite(values).all(1)
            if bad.any():
                layer = measured.layer_numbers[int(bad.nonzero()[0])]
                raise ValueError(
                    f"{statistic} of {part.upper()} in layer {layer} ({tap}) holds NaN or Inf: {model.name}"
                )
    return measured


def pooled(parts: Sequence[Measurement]) -> Measurement:
    """The measurement over the prompts of all parts together; all of the same model."""
    tokens = sum(part.tokens for part in parts)
    first = parts[0]
    scores = {
        key: QK(*(_pool([part.scores[key][i] for part in parts], parts, key[1]) for i in range(2)))
        for key in first.scores
    }
    return Measurement(tokens, first.layer_numbers, scores)


def _pool(values: Sequence[Tensor], parts: Sequence[Measurement], statistic: Statistic) -> Tensor:
    if STATISTICS[statistic].maximum:
        return torch.stack(list(values)).amax(0)
    power = STATISTICS[statistic].power
    tokens = torch.tensor([part.tokens for part in parts], dtype=torch.float64)
    mean = torch.einsum("p,pln->ln", tokens / tokens.sum(), torch.stack(list(values)).double() ** power)
    return (mean ** (1 / power)).float()


def rope_pair(channel: int, pairs: int, *, interleaved: bool) -> int | None:
    """The RoPE frequency, as an index into `inv_freq`, of a channel of a head; None beyond the rotary part."""
    if channel >= 2 * pairs:
        return None
    return channel // 2 if interleaved else channel % pairs
