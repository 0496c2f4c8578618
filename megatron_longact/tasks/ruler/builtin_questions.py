"""Questions about a land that does not exist, in the formats of SQuAD 2.0 and HotpotQA.

For whoever has neither file: nobody can know the answers without reading the documents, every name is of one
person, place or thing, and every question has one answer. The sets are always the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

NUM_ARTICLES, NUM_PARAGRAPHS, NUM_PAIRS = 60, 20, 600

_BEGINNINGS = (
    "Al", "Bar", "Cor", "Dal", "El", "Fen", "Gor", "Hal", "Ist", "Jor", "Kel", "Lun", "Mar", "Nor", "Ol", "Per",
    "Quil", "Ran", "Sel", "Tam", "Ur", "Vel", "Wen", "Yar", "Zor",
)  # fmt: skip
_MIDDLES = (
    "a", "an", "ar", "e", "el", "en", "i", "il", "im", "in", "o", "ol", "on", "or", "u", "ul", "um", "un",
)  # fmt: skip
_ENDINGS = (
    "bek", "da", "dell", "fira", "gast", "ka", "lin", "mond", "na", "neth", "pol", "ra", "reth", "rin", "sa", "stad",
    "ta", "thal", "ven", "vik", "wick", "zar",
)  # fmt: skip

_CRAFTS = (
    "baker", "beekeeper", "bookbinder", "botanist", "carpenter", "cartographer", "clockmaker", "composer", "cooper",
    "engraver", "geologist", "glassblower", "locksmith", "mason", "miller", "painter", "poet", "potter", "sailor",
    "shepherd", "surveyor", "tailor", "weaver",
)  # fmt: skip
_GOODS = (
    "bells", "blankets", "bricks", "candles", "cheese", "cider", "clocks", "compasses", "copper pans", "drums",
    "fishing nets", "flutes", "honey", "ink", "lace", "lanterns", "leather gloves", "mirrors", "paper", "pears",
    "porcelain", "rope", "saddles", "sails", "salt", "slate", "tiles", "umbrellas", "violins", "wheels",
)  # fmt: skip
_FEATURES = ("chapel", "covered market", "drawbridge", "granary", "lighthouse", "observatory", "town hall", "windmill")
_SEASONS = ("spring", "summer", "autumn", "winter")


@cache
def squad() -> dict[str, Any]:
    """Articles on districts, a paragraph for each of their towns, three questions a paragraph."""
    land = _Land("squad")
    return {"version": "built-in", "data": [land.article() for _ in range(NUM_ARTICLES)]}


@cache
def hotpotqa() -> list[dict[str, Any]]:
    """Questions that need two of their ten documents: a person's, and that of the town of their birth."""
    land = _Land("hotpotqa")
    pairs = [land.person_and_town() for _ in range(NUM_PAIRS)]
    others = [document for person, town, _, _ in pairs for document in (person, town)]
    return [land.two_hops(*pair, others=others) for pair in pairs]


class _Land:
    """Draws names and facts, each name once."""

    def __init__(self, name: str) -> None:
        self.rng = random.Random(f"built-in questions/{name}")
        self._names = self._distinct_names()

    def _distinct_names(self) -> Iterator[str]:
        seen: set[str] = set()
        while True:
            parts = [self.rng.choice(_BEGINNINGS), self.rng.choice(_MIDDLES)]
            if self.rng.random() < 0.3:
                parts += [self.rng.choice("bdfglmnrstv"), self.rng.choice(_MIDDLES)]
            name = "".join([*parts, self.rng.choice(_ENDINGS)])
            if name not in seen:
                seen.add(name)
                yield name

    def article(self) -> dict[str, Any]:
        district = next(self._names)
        return {"title": district, "paragraphs": [self.paragraph(district) for _ in range(NUM_PARAGRAPHS)]}

    def paragraph(self, district: str) -> dict[str, Any]:
        """A paragraph of SQuAD's format: seven sentences in one order or another after the first."""
        town, river, founder, guest, dish, square = (next(self._names) for _ in range(6))
        craft, goods, feature, year, people = self._facts()
        sentences = [
            f"The {craft} {founder} founded it in {year}.",
            f"The river {river} passes through it before it reaches the plain.",
            f"Its workshops are known for {goods}, which are sold in all of {district}.",
            f"The {feature} on {square} Square is the oldest building that still stands.",
            f"In {self.rng.choice(_SEASONS)} the inhabitants cook {dish}, a stew of roots and smoked fish.",
            f"At the last count it had {people} inhabitants.",
            f"The traveller {guest} spent a year there and described its streets in a long letter.",
        ]
        self.rng.shuffle(sentences)
        questions = {
            f"Who founded {town}?": founder,
            f"Which river passes through {town}?": river,
            f"In which year was {town} founded?": year,
            f"How many inhabitants did {town} have at the last count?": people,
            f"Which stew do the inhabitants of {town} cook?": dish,
            f"On which square is the oldest building of {town}?": square,
            f"Which traveller spent a year in {town}?": guest,
        }
        asked = self.rng.sample(list(questions.items()), 3)
        context = " ".join([f"{town} is a town in the district of {district}.", *sentences])
        return {"context": context, "qas": [self._question(q, a, context) for q, a in asked]}

    def _question(self, question: str, answer: str, context: str) -> dict[str, Any]:
        found = {"text": answer, "answer_start": context.index(answer)}
        return {"question": question, "answers": [found], "is_impossible": False}

    def _facts(self) -> tuple[str, str, str, str, str]:
        pick: Callable[..., str] = self.rng.choice
        year, people = self.rng.randrange(1200, 1900), self.rng.randrange(2000, 99000)
        return pick(_CRAFTS), pick(_GOODS), pick(_FEATURES), str(year), f"{people:,}"

    def person_and_town(self) -> tuple[list[Any], list[Any], str, str]:
        """Two documents [title, sentences], a question about both and its answer."""
        person, teacher, town, river, founder = (next(self._names) for _ in range(5))
        craft, goods, feature, year, people = self._facts()
        born = int(year) + 20
        person_document = [
            person,
            [
                f"{person} was a {craft} who was born in {town} in {born}.",
                f" The craft was taught by {teacher}, with whom {person} stayed for nine years.",
                f" Most of what {person} made was lost in a fire in {born + 60}.",
            ],
        ]
        town_document = [
            town,
            [
                f"{town} is a town on the river {river}.",
                f" It was founded by {founder} in {year} and is known for {goods}.",
                f" It has a {feature} and {people} inhabitants.",
            ],
        ]
        place = f"the town in which the {craft} {person} was born"
        question, answer = self.rng.choice(
            [
                (f"On which river lies {place}?", river),
                (f"Who founded {place}?", founder),
                (f"How many inhabitants has {place}?", people),
                (f"In which year was {place} founded?", year),
            ]
        )
        return person_document, town_document, question, answer

    def two_hops(
        self, person: list[Any], town: list[Any], question: str, answer: str, *, others: list[list[Any]]
    ) -> dict[str, Any]:
        """An entry of HotpotQA's format: the two documents among eight others, in a drawn order."""
        unrelated = [document for document in self.rng.sample(others, 10) if document not in (person, town)]
        context = [person, town, *unrelated[:8]]
        self.rng.shuffle(context)
        return {"question": question, "answer": answer, "context": context}
