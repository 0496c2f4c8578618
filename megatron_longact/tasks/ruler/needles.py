"""The eight needle-in-a-haystack tasks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from uuid import UUID

from megatron_longact.tasks.ruler.haystack import Haystack, split_sentences
from megatron_longact.tasks.ruler.makers import NOISE, Draft, fill, rng_of
from megatron_longact.tasks.ruler.tasks import RulerTask, Token
from megatron_longact.tasks.ruler.words import WordList

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of the haystack's sentences; a needle stands at one of these."""


@dataclass(frozen=True)
class NeedleMaker:
    """`niah.py`.

    Odd there, and kept: needles are shuffled by the seed alone, so all samples have one order; a needle says
    "numbers" also where the question says "number"; the singular is made by replacing "are" wherever it stands, also
    in the model's template. Unlike there, no key or value occurs twice in a sample.
    """

    task: RulerTask
    seed: int
    template: str
    """The task's template within the model's."""
    haystack: Haystack
    words: WordList

    def minimum(self, index: int) -> int:
        """See `Maker`."""
        return self.task.num_keys * self.task.num_values

    def maximum(self) -> int | None:
        """See `Maker`."""
        return None

    def make(self, index: int, size: int) -> Draft:
        """See `Maker`."""
        rng, used = rng_of(self.seed, self.task, index), set[str]()
        keys = [self._draw(self.task.keys, rng, used) for _ in range(self.task.num_keys)]
        values = [[self._draw(self.task.values, rng, used) for _ in range(self.task.num_values)] for _ in keys]
        needles = [self._needle(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        random.Random(self.seed).shuffle(needles)
        asked = rng.sample(range(len(keys)), self.task.num_queries)
        if self.task.haystack == "essay":
            context = self._essay(needles, size, rng)
        else:
            context = self._lines(needles, size, rng, used)
        return self._draft(context, [keys[i] for i in asked], [value for i in asked for value in values[i]])

    def _draw(self, kind: Token, rng: random.Random, used: set[str]) -> str:
        while True:
            if kind == "numbers":
                drawn = str(rng.randint(10**6, 10**7 - 1))
            elif kind == "words":
                drawn = self.words.key(rng)
            else:
                drawn = str(UUID(int=rng.getrandbits(128), version=4))
            if drawn not in used:
                used.add(drawn)
                return drawn

    def _needle(self, key: str, value: str) -> str:
        return fill(NEEDLE, type_needle_v=self.task.values, key=key, value=value)

    def _essay(self, needles: list[str], size: int, rng: random.Random) -> str:
        sentences = split_sentences(self.haystack.text(size))
        places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
        parts = []
        for begin, end, needle in zip([0, *places], places, needles, strict=False):
            parts += [" ".join(sentences[begin:end]), needle]
        return " ".join([*parts, " ".join(sentences[places[-1] :])])

    def _lines(self, needles: list[str], size: int, rng: random.Random, used: set[str]) -> str:
        if self.task.haystack == "noise":
            lines = [NOISE] * size
        else:
            kinds = (self.task.keys, self.task.values)
            lines = [self._needle(*(self._draw(kind, rng, used) for kind in kinds)) for _ in range(size)]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _draft(self, context: str, keys: list[str], outputs: list[str]) -> Draft:
        template, prefix, kind = self.template, self.task.answer_prefix, str(self.task.values)
        if len(outputs) == 1:
            template, prefix = _singular(template), _singular(prefix)
            kind = kind.removesuffix("s")
        query = ", and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]
        text, prefix = (fill(part, type_needle_v=kind, context=context, query=query) for part in (template, prefix))
        sources = {"words": self.words.source} if self.task.keys == "words" else {}
        if self.task.haystack == "essay":
            sources["haystack"] = self.haystack.source
        return Draft(text, prefix, outputs, sources)


def _singular(template: str) -> str:
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")
