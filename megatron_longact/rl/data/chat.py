"""Prompts into tokens with Megatron's tokenizers: strings as they are, message lists by a chat template.

`--tokenizer-type` makes the tokenizer. A Hugging Face one brings its template and its special tokens along. Of a
SentencePiece one Megatron renders the template with nothing but the messages (`bos_token` and the like are empty in it)
and encodes what comes out as plain text, so control pieces such as `</s>` cannot be written by a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, Any]]
"""A conversation; each message has a `role` and a `content`."""

_HUGGING_FACE = ("huggingface", "megatron")
"""Megatron's names of the tokenizer libraries that wrap one of `transformers`."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as text, which rewards get to see, and as the tokens that the model reads."""

    text: str
    tokens: tuple[int, ...]


class PromptEncoder:
    """Encodes prompts.

    tokenizer: one of Megatron's (`tokenize`, `apply_chat_template`, `chat_template`, `library`); for string prompts
    anything with `tokenize`. chat_template: in Jinja, used instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template or _own_template(tokenizer)

    def encode(self, prompt: str | Messages) -> EncodedPrompt:
        """Text and tokens; a message list ends where the assistant's turn begins.

        Strings are tokenized as the tokenizer does it, with its special tokens if it adds any
        (`--tokenizer-hf-no-include-special-tokens`: without). Raises ValueError for a message list without a
        template, and for one that the template refuses.
        """
        if isinstance(prompt, str):
            return EncodedPrompt(prompt, tuple(self._tokenizer.tokenize(prompt)))
        if self._template is None:
            raise ValueError(
                "the prompt is a list of messages, but the tokenizer has no chat template; give --chat-template FILE"
            )
        return EncodedPrompt(self._apply(prompt, tokenize=False), tuple(self._apply(prompt, tokenize=True)))

    def _apply(self, messages: Messages, *, tokenize: bool) -> Any:
        # Hugging Face's tokenizers put the ids into a dict unless told not to; Megatron's own do not know that option.
        options = {"return_dict": False} if self._tokenizer.library in _HUGGING_FACE else {}
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                tokenize=tokenize,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:  # a template is a program of the user's
            raise ValueError(f"the chat template failed on these messages: {error}") from error


def read_chat_template(value: str | None) -> str | None:
    """Megatron's `--chat-template`: the template itself, which has a brace in it, or the name of its file."""
    if value is None or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--chat-template {value}: not a template, and not a file to read one from: {error}"
        ) from error


def check_end_of_text(tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has no end-of-text token: no response could end by itself."""
    eod = tokenizer.eod
    if eod is None or eod < 0:
        raise ValueError("the tokenizer has no end-of-text (eos) token, so no response could end by itself")


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template
