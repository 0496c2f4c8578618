"""Variable tracking."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from megatron_longact.tasks.ruler.makers import NOISE, Draft, fill, rng_of
from megatron_longact.tasks.ruler.tasks import RulerTask


@dataclass(frozen=True)
class TrackingMaker:
    """`variable_tracking.py`: noise with a chain of assignments, after a solved example of its own.

    The example has the given number of noise sentences in all samples; each sample puts other names and another
    number into it. Names are drawn without a repetition.
    """

    task: RulerTask
    seed: int
    template: str
    example_size: int

    def minimum(self, index: int) -> int:
        """See `Maker`."""
        return self.task.num_hops + 1

    def maximum(self) -> int | None:
        """See `Maker`."""
        return None

    def make(self, index: int, size: int) -> Draft:
        """See `Maker`."""
        rng = rng_of(self.seed, self.task, index)
        chains = [self._chain(rng, letters=5) for _ in range(self.task.num_chains)]
        values = [str(rng.randrange(10000, 99999)) for _ in chains]
        example = self._example(rng)
        context = _tracking_text(chains, values, size, rng)
        fields = {"query": values[0], "num_v": self.task.num_hops + 1}
        text = fill(self.template, context=context, **fields)
        start = text.index(self.task.template[:20])
        prefix = fill(self.task.answer_prefix, **fields)
        return Draft(text[:start] + example + "\n" + text[start:], prefix, chains[0], {})

    def example_question(self, rng: random.Random, chain: list[str] | None = None) -> str:
        """The example without its answer and without the model's template: names and number from `rng`."""
        chain = chain or self._chain(rng, letters=3)
        value = str(rng.randrange(10000, 99999))
        context = _tracking_text([chain], [value], self.example_size, rng_of(self.seed, self.task, "example"))
        template = self.task.template + self.task.answer_prefix
        return fill(template, context=context, query=value, num_v=self.task.num_hops + 1)

    def _example(self, rng: random.Random) -> str:
        chain = self._chain(rng, letters=3)
        return f"{self.example_question(rng, chain)} {' '.join(chain)}\n"

    def _chain(self, rng: random.Random, *, letters: int) -> list[str]:
        names: dict[str, None] = {}
        while len(names) <= self.task.num_hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name != "VAR":
                names[name] = None
        return list(names)


def _tracking_text(chains: list[list[str]], values: list[str], size: int, rng: random.Random) -> str:
    """Noise sentences with each chain's assignments among them, in their order; a space follows all but the first."""
    lines = [NOISE] * size
    for chain, value in zip(chains, values, strict=True):
        assignments = [f"VAR {chain[0]} = {value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in pairwise(chain)]
        places = sorted(rng.sample(range(len(lines)), len(assignments)))
        for i, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
            lines.insert(place + i, assignment)
    return "\n".join(lines)
