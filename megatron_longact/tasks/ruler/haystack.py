"""The prose that needles are hidden in: the user's essays, or CPython's own documentation."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_longact.tasks.needle import Split, sentences_of

_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Haystack:
    """Words of prose in their order, and where they come from."""

    words: tuple[str, ...]
    source: str

    def text(self, num_words: int) -> str:
        """The first `num_words` words, from the beginning again when they are used up."""
        repeats = -(-num_words // len(self.words))
        return " ".join((self.words * repeats)[:num_words])


@cache
def haystack(path: Path | None = None) -> Haystack:
    """The essays of a file, or the built-in prose.

    path: RULER's `PaulGrahamEssays.json` (an object with `text`), or plain text with another ending. ValueError for
    a file that is neither.
    """
    if path is None:
        text = " ".join([*sentences_of("train"), *sentences_of("heldout")])
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Haystack(tuple(text.split()), f"built-in prose (pydoc_data.topics of Python {version})")
    words = _read(path).split()
    if not words:
        raise ValueError(f"{path} holds no words")
    return Haystack(tuple(words), f"essays of {path.name}")


@cache
def prose_of(split: Split) -> Haystack:
    """One part of the built-in prose: no sentence of it is in the other one."""
    return Haystack(tuple(" ".join(sentences_of(split)).split()), f"built-in prose, the part for {split}")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: cut after a full stop, question or exclamation mark (the official script uses nltk)."""
    return [sentence for sentence in _SENTENCE_ENDS.split(text.strip()) if sentence]


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        return str(json.loads(text)["text"]) if path.suffix == ".json" else text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the essays of {path}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no essays file: a JSON object with the essays in 'text' is needed") from error
