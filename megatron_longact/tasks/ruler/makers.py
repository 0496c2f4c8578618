"""One maker for each of the five official scripts: what a sample of a given index and size says.

The size is the number of haystack sentences (noise, needle), of haystack words (essay), of listed words or of
documents. A sample draws from generators seeded by (seed, task, index) alone, and draws what it asks for before
its haystack: at any size it asks the same.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Protocol

from megatron_longact.tasks.ruler.tasks import RulerTask

PROBE = -1
"""Index of the sample that sizes are tried with; none of the samples that are given out."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""A sentence of the haystack "noise"."""


@dataclass(frozen=True)
class Draft:
    """A sample's text, its answers, and which sources it was made from."""

    input: str
    answer_prefix: str
    outputs: list[str]
    sources: dict[str, str]


class Maker(Protocol):
    """Makes samples of one task."""

    def minimum(self, index: int) -> int:
        """The least size that a sample can have."""
        ...

    def maximum(self) -> int | None:
        """The largest size, if there is one."""
        ...

    def make(self, index: int, size: int) -> Draft:
        """The sample of an index at a size between the two."""
        ...


def fill(template: str, **values: object) -> str:
    """The template with the named fields filled in, all at once; other braces stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match[1], match[0])), template)


def rng_of(seed: int, task: RulerTask, index: int | str) -> random.Random:
    """A generator of its own for each sample; the same in every process."""
    return random.Random(f"{seed}/{task.name}/{index}")
