"""pass@k: the chance that one of k samples is right, estimated without bias from n >= k of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Annotated

from megatron_longact.flags import Flag


@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """Which pass@k an evaluation measures. Raises ValueError for what cannot be."""

    samples: Annotated[int, Flag("--eval-samples")] = 0
    """Responses sampled for each held-out prompt, for pass@k, beside the greedy one. Default: 0, no pass@k."""

    ks: Annotated[tuple[int, ...], Flag("--eval-pass-at", metavar="K", nargs="*")] = ()
    """The k's of pass@k. Default: 1 and --eval-samples."""

    temperature: Annotated[float | None, Flag("--eval-temperature")] = None
    """Temperature of these samples. Default: that of training."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"--eval-samples is {self.samples}; it must not be negative")
        if not self.samples and (self.ks or self.temperature is not None):
            raise ValueError("--eval-pass-at and --eval-temperature need --eval-samples, the samples of each prompt")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise ValueError(f"--eval-pass-at {k} must lie between 1 and --eval-samples {self.samples}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"--eval-temperature is {self.temperature}; it must be positive")

    @property
    def measured(self) -> tuple[int, ...]:
        """The k's, ascending, each once."""
        return tuple(sorted(set(self.ks or (1, self.samples)))) if self.samples else ()


def pass_at_k(*, samples: int, correct: int, k: int) -> float:
    """1 - C(samples - correct, k) / C(samples, k), of Codex (arXiv 2107.03374, equation 1), in exact integers."""
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {correct} right ones among {samples} samples makes no sense")
    every = comb(samples, k)
    return (every - comb(samples - correct, k)) / every
