"""Drawing tokens from logits, with randomness that is a function of what is sampled.

Shapes: b rows, V vocabulary entries. Nothing here keeps a generator: the uniform numbers of one
response are a pure function of (seed, step, prompt, sample), so a response depends neither on what
else is in its batch nor on what was sampled before, and no generator state needs a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn. Raises ValueError for a value that makes no sense."""

    max_response_length: int
    """Tokens of a response at most, the end-of-text token included."""

    temperature: float = 1.0
    """Logits are divided by this."""

    top_p: float = 0.0
    """Smallest set of tokens with at least this probability; 0 and 1: all."""

    top_k: int = 0
    """Only the k likeliest tokens; 0 and below: all."""

    greedy: bool = False
    """Take the likeliest token; temperature, top-p and top-k then mean nothing."""

    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.max_response_length < 1:
            raise ValueError(f"max_response_length is {self.max_response_length}; it must be >= 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive (greedy has its own flag)")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in [0, 1]")


def sampled_log_probs(logits: Tensor, *, sampling: Sampling) -> Tensor:
    """fp32 log-probs [b, V] of the distribution that is sampled from logits [b, V].

    Tokens that top-k or top-p leaves out get -inf and the others are normalised again. Greedy
    decoding reports the model's own distribution.
    """
    scores = logits.float()
    if sampling.greedy:
        return scores.log_softmax(-1)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest_kept = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest_kept, -torch.inf)
    if 0 < sampling.top_p < 1:
        scores = scores.masked_fill(_outside_nucleus(scores, sampling.top_p), -torch.inf)
    return scores.log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token [b] at which each row's cumulative probability passes its uniform number [b].

    log_probs: [b, V], may hold -inf; uniforms: fp64 [b] in [0, 1). Sums in fp64: fp32 sums lose the
    tail of a large vocabulary. A token of probability 0 is never drawn.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniforms.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)


def uniform_numbers(seed: int, step: int, prompt: int, sample: int, *, count: int) -> np.ndarray:
    """`count` fp64 numbers in [0, 1) for one response, a pure function of the four indices."""
    key = np.random.SeedSequence([seed, step, prompt, sample])
    return np.random.Generator(np.random.PCG64(key)).random(count)


def _outside_nucleus(scores: Tensor, top_p: float) -> Tensor:
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    outside = probs.cumsum(-1) - probs >= top_p
    return torch.zeros_like(outside).scatter(-1, order, outside)
