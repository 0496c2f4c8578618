"""Prompts into tokens with Megatron's tokenizers: strings as they are, message lists by a chat template.

`--tokenizer-type` makes the tokenizer. A Hugging Face one brings its template and its special tokens along. Of a
SentencePiece one Megatron renders the template with nothing but the messages (`bos_token` and the like are empty in it)
and encodes what comes out as plain text, so control pieces such as `</s>` cannot be written by a template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_longact.tasks.pieces import TASK_TEMPLATE, PieceEncoder

Messages = Sequence[Mapping[str, Any]]
"""A conversation; each message has a `role` and a `content`."""

_HUGGING_FACE = ("huggingface", "megatron")
"""Megatron's names of the tokenizer libraries that wrap one of `transformers`."""

_ANSWER = "the-answer-of-the-assistant"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as text, which rewards get to see, and as the tokens that the model reads."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A template in Jinja, and the tokenizer that applies it: one of Megatron's or of `transformers`."""

    tokenizer: Any
    jinja: str

    @classmethod
    def of(cls, tokenizer: Any, *, given: str | None = None) -> ChatTemplate | None:
        """The given one, else the tokenizer's own, if it has one."""
        jinja = given or own_template(tokenizer)
        return None if jinja is None else cls(tokenizer, jinja)

    def apply(self, messages: Messages, *, tokenize: bool) -> Any:
        """Text or token ids, up to where the assistant's turn begins; ValueError for what the template refuses."""
        # Hugging Face's tokenizers put the ids into a dict unless told not to; Megatron's own do not know that option.
        options = {"return_dict": False} if _of_transformers(self.tokenizer) else {}
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.jinja,
                tokenize=tokenize,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:  # a template is a program of the user's
            raise ValueError(f"the chat template failed on these messages: {error}") from error

    def around(self) -> str:
        """What stands around a user's turn, with {task_template} in its place; ValueError if that cannot be told."""
        text: str = self.apply([{"role": "user", "content": TASK_TEMPLATE}], tokenize=False)
        if text.count(TASK_TEMPLATE) != 1:
            raise ValueError(f"the chat template does not put a user's turn into its text once: {text!r}")
        return text


class PromptEncoder:
    """Encodes prompts.

    tokenizer: one of Megatron's (`tokenize`, `apply_chat_template`, `chat_template`, `library`); for string prompts
    anything with `tokenize`. chat_template: in Jinja, used instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self._pieces = PieceEncoder(tokenizer.tokenize)
        self._template = ChatTemplate.of(tokenizer, given=chat_template)

    @property
    def has_template(self) -> bool:
        """Whether it can encode lists of messages."""
        return self._template is not None

    def encode(self, prompt: str | Messages, *, begun: str = "") -> EncodedPrompt:
        """Text and tokens; a message list ends where the assistant's turn begins, and goes on with what it has `begun`.

        Strings begin with the special tokens that the tokenizer begins a text with, if any, once
        (`--tokenizer-hf-no-include-special-tokens`: without). Raises ValueError for a message list without a
        template, and for one that the template refuses.
        """
        if isinstance(prompt, str):
            return EncodedPrompt(prompt + begun, tuple(self._pieces.prompt(prompt + begun)))
        if self._template is None:
            raise ValueError(
                "the prompt is a list of messages, but the tokenizer has no chat template; give --chat-template FILE"
            )
        text, tokens = (self._template.apply(prompt, tokenize=tokenize) for tokenize in (False, True))
        return EncodedPrompt(text + begun, (*tokens, *(self._pieces.piece(begun) if begun else ())))


def read_chat_template(value: str | None) -> str | None:
    """Megatron's `--chat-template`: the name of a file, or the template itself, which has a brace in it."""
    if value is None or ("{" in value and not os.path.isfile(value)):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--chat-template {value}: not a template, and not a file to read one from: {error}"
        ) from error


def own_template(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer brings along."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _of_transformers(tokenizer: Any) -> bool:
    """Whether it is one of `transformers`, or Megatron's around one."""
    return getattr(tokenizer, "library", "huggingface") in _HUGGING_FACE


def turn_end(tokenizer: Any, template: str | None) -> int | None:
    """The special token that a template ends the assistant's turn with; None if it is no such token, or not known.

    Known is it of Hugging Face tokenizers: a SentencePiece model does not say which of its pieces are special.
    """
    if template is None or not _of_transformers(tokenizer):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except Exception:  # a template is a program of the user's; one that refuses this says nothing
        return None
    _, answer, behind = text.rpartition(_ANSWER)
    added: dict[str, int] = tokenizer._tokenizer.tokenizer.get_added_vocab()
    ends = [token for token in added if answer and behind.lstrip().startswith(token)]
    return added[max(ends, key=len)] if ends else None
