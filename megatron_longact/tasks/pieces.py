"""Texts into tokens where a prompt is put together from pieces: what a tokenizer adds to a text is added once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

TASK_TEMPLATE = "{task_template}"
"""Where a prompt stands in a model's template."""


class PieceEncoder:
    """Encodes pieces of a prompt with nothing added, and begins the whole as the tokenizer begins a text.

    encode: the tokenizer's own, with the special tokens that it puts around a text, if any. Those behind it (`</s>`)
    are left off everywhere: a response goes on where the prompt ends.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before a text, such as `<s>`; mostly one token or none."""
        return list(self._added[0])

    def piece(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        ids, (before, behind) = list(self._encode(text)), self._added
        return ids[len(before) : len(ids) - len(behind)]

    def begun(self, ids: Sequence[int]) -> list[int]:
        """A whole prompt out of pieces: with the prefix, unless they spell it (a template that writes `<s>`)."""
        return list(ids) if self.begins(ids) else [*self.prefix, *ids]

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the ids begin as the tokenizer begins a text."""
        return list(ids[: len(self.prefix)]) == self.prefix

    def prompt(self, text: str) -> list[int]:
        """The ids of a whole prompt."""
        return self.begun(self.piece(text))

    def encode(self, text: str) -> list[int]:
        """`prompt`, by the name that benchmarks ask a tokenizer for."""
        return self.prompt(text)

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """What is put before a text and behind it, seen from what the tokenizer makes of nothing and of a letter."""
        nothing, letter = list(self._encode("")), list(self._encode("a"))
        for before in range(len(nothing), -1, -1):
            behind = len(nothing) - before
            around = letter[:before] + letter[len(letter) - behind :]
            if around == nothing and len(letter) > len(nothing):
                return nothing[:before], nothing[before:]
        return [], []
