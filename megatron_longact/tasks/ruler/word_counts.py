"""Common words and frequent coded words."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from math import pi

from megatron_longact.tasks.ruler.makers import Draft, fill, rng_of
from megatron_longact.tasks.ruler.tasks import RulerTask
from megatron_longact.tasks.ruler.words import WordList

SHORT_CONTEXT = 4096
"""Below this many tokens the common-words task repeats its words less often."""


@dataclass(frozen=True)
class CommonWordsMaker:
    """`common_words_extraction.py`: a numbered list, after a solved example of its own.

    Odd there, and kept: below 4096 tokens words are repeated 6 and 1 times instead of 30 and 3; the list is
    shuffled by the seed alone; the example stands within the model's template as well.
    """

    task: RulerTask
    seed: int
    template: str
    max_seq_length: int
    words: WordList

    def minimum(self, index: int) -> int:
        """See `Maker`."""
        return self.task.num_common

    def maximum(self) -> int | None:
        """See `Maker`."""
        return self.words.most

    def make(self, index: int, size: int) -> Draft:
        """See `Maker`."""
        rng = rng_of(self.seed, self.task, index)
        short = self.max_seq_length < SHORT_CONTEXT
        repeats = (6, 1) if short else (self.task.repeats_common, self.task.repeats_uncommon)
        listed, answer = self._list(*((20, 3, 1) if short else (40, 10, 3)), rng)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(answer, start=1))
        example = fill(self.template + self.task.answer_prefix, context=listed) + " " + numbered
        context, common = self._list(size, *repeats, rng)
        text = example + "\n" + fill(self.template, context=context)
        return Draft(text, self.task.answer_prefix, common, {"words": self.words.source_for(size)})

    def _list(self, count: int, common: int, uncommon: int, rng: random.Random) -> tuple[str, list[str]]:
        drawn = self.words.sample(count, rng)
        often, seldom = drawn[: self.task.num_common], drawn[self.task.num_common :]
        listed = often * common + seldom * uncommon
        random.Random(self.seed).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1)), often


@dataclass(frozen=True)
class CodedWordsMaker:
    """`freq_words_extraction.py`: coded words with frequencies of a zeta distribution, the commonest one dots.

    The vocabulary has a word for each 50 tokens. The size is the number of words that the distribution is scaled
    to; fewer are there, because counts are rounded down. Odd there, and kept: vocabulary and text are shuffled by
    the seed alone. Sizes at which a fourth word would be as frequent as the third are not used.
    """

    task: RulerTask
    seed: int
    template: str
    vocabulary: int

    def minimum(self, index: int) -> int:
        """See `Maker`."""
        return next(size for size in range(1, 1000) if self._is_clear(size))

    def maximum(self) -> int | None:
        """See `Maker`."""
        return None

    def make(self, index: int, size: int) -> Draft:
        """See `Maker`."""
        while not self._is_clear(size):
            size -= 1
        rng, words = rng_of(self.seed, self.task, index), set[str]()
        while len(words) < self.vocabulary:
            words.add("".join(rng.choices(string.ascii_lowercase, k=self.task.coded_word_length)))
        coded = sorted(words)
        random.Random(self.seed).shuffle(coded)
        coded[0] = "..."
        listed = [word for rank, word in enumerate(coded, start=1) for _ in range(self._count(size, rank))]
        random.Random(self.seed).shuffle(listed)
        return Draft(fill(self.template, context=" ".join(listed)), self.task.answer_prefix, coded[1:4], {})

    def _count(self, size: int, rank: int) -> int:
        assert self.task.alpha == 2, "zeta(2) is written out"
        return int(size * rank**-self.task.alpha / (pi**2 / 6))

    def _is_clear(self, size: int) -> bool:
        fifth = self._count(size, 5) if self.vocabulary > 4 else 0
        return self._count(size, 4) > fifth
