"""Question answering over many documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_longact.tasks.ruler.makers import PROBE, Draft, fill, rng_of
from megatron_longact.tasks.ruler.questions import Question, QuestionSet
from megatron_longact.tasks.ruler.tasks import RulerTask


@dataclass(frozen=True)
class QuestionMaker:
    """`qa.py`: sample i asks question i of the file, with its own documents and others.

    Odd there, and kept: the documents are shuffled by the seed alone, so that of equally many documents the right
    one stands at the same place; with as many documents as there are, all are given in their order before that.
    """

    task: RulerTask
    seed: int
    template: str
    questions: QuestionSet

    def minimum(self, index: int) -> int:
        """See `Maker`."""
        return len(self._question(index).documents)

    def maximum(self) -> int | None:
        """See `Maker`."""
        return None

    def make(self, index: int, size: int) -> Draft:
        """See `Maker`."""
        question = self._question(index)
        texts = [self.questions.documents[number] for number in self._chosen(index, size)]
        random.Random(self.seed).shuffle(texts)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
        text = fill(self.template, context=context, query=question.query)
        return Draft(text, self.task.answer_prefix, list(question.answers), {"questions": self.questions.source})

    def _question(self, index: int) -> Question:
        return self.questions.questions[0 if index == PROBE else index]

    def _chosen(self, index: int, size: int) -> list[int]:
        question, count = self._question(index), len(self.questions.documents)
        if size >= count:
            return [number % count for number in range(size)]
        rng, missing = rng_of(self.seed, self.task, index), size - len(question.documents)
        if missing <= len(question.more):
            return [*question.documents, *rng.sample(question.more, missing)]
        given = {*question.documents, *question.more}
        others = [number for number in range(count) if number not in given]
        return [*question.documents, *question.more, *rng.sample(others, missing - len(question.more))]
