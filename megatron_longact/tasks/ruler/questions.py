"""Questions and documents of the two QA tasks: official files that the user has, or a set of our own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megatron_longact.tasks.ruler.builtin_questions import hotpotqa, squad

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
