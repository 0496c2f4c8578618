"""The two QA tasks, over many documents: questions of official files that the user has, or of a set of our own."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megatron_longact.tasks.ruler.builtin_questions import hotpotqa, squad
from megatron_longact.tasks.ruler.makers import PROBE, Draft, fill, rng_of
from megatron_longact.tasks.ruler.tasks import RulerTask

Dataset = Literal["squad", "hotpotqa"]


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and the numbers of the documents that go with it.

    documents: those that are always given. more: those of the same article, which are given before any others.
    """

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions in the order of their file, the documents (each once, sorted), and where both come from."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    source: str


@cache
def question_set(dataset: Dataset, path: Path | None = None) -> QuestionSet:
    """The questions of a file, or the built-in ones; ValueError for a file of another kind.

    squad: SQuAD 2.0 (`dev-v2.0.json`), without its unanswerable questions. hotpotqa: HotpotQA with distractors
    (`hotpot_dev_distractor_v1.json`). The built-in sets are made in the same two formats.
    """
    if path is None:
        data: Any = squad() if dataset == "squad" else hotpotqa()
        source = f"built-in questions in the manner of {'SQuAD' if dataset == 'squad' else 'HotpotQA'}"
    else:
        data, source = _read(path), f"questions of {path.name}"
    try:
        questions, documents = _from_squad(data) if dataset == "squad" else _from_hotpotqa(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no {dataset} file: {type(error).__name__} {error}") from error
    if not questions:
        raise ValueError(f"{path} holds no answerable question")
    return QuestionSet(tuple(questions), tuple(documents), source)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read the questions of {path}: {error}") from error


def _from_squad(data: Any) -> tuple[list[Question], list[str]]:
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({paragraph["context"] for paragraphs in articles for paragraph in paragraphs})
    numbers = {document: i for i, document in enumerate(documents)}
    questions = []
    for paragraphs in articles:
        of_article = [numbers[paragraph["context"]] for paragraph in paragraphs]
        for paragraph, own in zip(paragraphs, of_article, strict=True):
            more = tuple(number for number in of_article if number != own)
            for question in paragraph["qas"]:
                if not question["is_impossible"]:
                    answers = tuple(answer["text"] for answer in question["answers"])
                    questions.append(Question(question["question"], answers, (own,), more))
    return questions, documents


def _from_hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
    documents = sorted({text for context in texts for text in context})
    numbers = {document: i for i, document in enumerate(documents)}
    questions = [
        Question(entry["question"], (entry["answer"],), tuple(numbers[text] for text in context))
        for entry, context in zip(data, texts, strict=True)
    ]
    return questions, documents


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
