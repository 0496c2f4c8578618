"""Which token ids a model can be asked to write, and which of them end a response.

A tokenizer's number of entries says neither: ids can have gaps, embeddings can be fewer, and models end a turn with
other tokens than the tokenizer's end of text. What ends a response: `--stop-token-ids` alone, if given; else the
tokenizer's end of text, `eos_token_id` of a generation_config.json beside the tokenizer, and what the chat template
ends a turn with.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_longact.flags import Flag
from megatron_longact.tasks.chat import own_template, read_chat_template, turn_end
from megatron_longact.tasks.json_lines import parse_json

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """size: ids below it can be drawn; stop_ids: those that end a response, of which `eod` fills what lies behind."""

    size: int
    stop_ids: tuple[int, ...]
    remark: str
    """One line for the user: which tokens end a response, and what says so."""

    @property
    def eod(self) -> int:
        """The first of the stop ids: the tokenizer's end of text, unless others were given."""
        return self.stop_ids[0]


@dataclass(frozen=True, kw_only=True)
class StopFlags:
    """The flags, of every program that lets a model write, that `vocabulary_from_args` reads."""

    stop_token_ids: Annotated[tuple[int, ...], Flag(metavar="ID")] = ()
    """Token ids that end a response, and no others. Default: the tokenizer's end of text, eos_token_id of a
    generation_config.json beside it, and what the chat template ends a turn with."""


def vocabulary_from_args(args: Namespace, tokenizer: Any) -> Vocabulary:
    """That of Megatron's arguments and its tokenizer.

    Raises ValueError, before anything is built, for a tokenizer whose ids the model has no embeddings of, and where no
    token can end a response.
    """
    return vocabulary_of(
        tokenizer,
        name=_name(args),
        embeddings=embeddings_of(args),
        chat_template=read_chat_template(args.chat_template),
        given=getattr(args, "stop_token_ids", None),
    )


def vocabulary_of(
    tokenizer: Any,
    *,
    name: str,
    embeddings: int | None,
    chat_template: str | None = None,
    given: Sequence[int] | None = None,
) -> Vocabulary:
    """As `vocabulary_from_args`; name: of the tokenizer, its folder or file; embeddings: of the model, None: enough."""
    largest = check_embeddings(tokenizer, name=name, embeddings=embeddings)
    size = largest + 1
    if given:
        wrong = [stop for stop in given if not 0 <= stop < size]
        if wrong:
            raise ValueError(f"--stop-token-ids has {wrong[0]}, but the tokenizer {name} has the ids 0 to {largest}")
        found = {stop: ["--stop-token-ids"] for stop in given}
    else:
        found = _found_stops(tokenizer, name=name, chat_template=chat_template, size=size)
    if not found:
        raise ValueError(
            f"the tokenizer {name} has no end-of-text (eos) token, so no response could end by itself; give "
            "--stop-token-ids"
        )
    return Vocabulary(size, tuple(found), _remark(tokenizer, found))


def embeddings_of(args: Namespace) -> int | None:
    """Embeddings of the model that Megatron's arguments describe; of a converted one, those that it really has."""
    known: int | None = getattr(args, "hf_vocab_size", None) or args.padded_vocab_size or args.vocab_size
    return known


def check_tokenizer(args: Namespace, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer makes ids that the model of Megatron's arguments has no embedding of."""
    check_embeddings(tokenizer, name=_name(args), embeddings=embeddings_of(args))


def check_embeddings(tokenizer: Any, *, name: str, embeddings: int | None) -> int:
    """The tokenizer's largest id; ValueError if the model has no embedding of it.

    Megatron itself embeds such ids as zeros at tensor parallel sizes above 1, and says nothing.
    """
    largest = largest_id(tokenizer)
    if embeddings is not None and largest >= embeddings:
        raise ValueError(
            f"the tokenizer {name} makes ids up to {largest}, but the model has {embeddings} embeddings: give the "
            f"tokenizer that the model was trained with, or a model with at least {largest + 1} embeddings "
            "(for one that starts from nothing: --padded-vocab-size)"
        )
    return largest


def largest_id(tokenizer: Any) -> int:
    """The largest id that a Megatron tokenizer makes; its number of entries is less where ids have gaps."""
    largest: int = tokenizer.vocab_size - 1
    if getattr(tokenizer, "library", None) in ("huggingface", "megatron"):  # all others number without gaps
        largest = max(tokenizer.inv_vocab, default=largest)
    return largest


def stops_of_generation_config(tokenizer_model: str) -> list[int]:
    """`eos_token_id` of the generation_config.json in a tokenizer's folder or beside its file; none if it says none.

    Raises ValueError for a file that cannot be read.
    """
    path = Path(tokenizer_model)
    file = (path if path.is_dir() else path.parent) / GENERATION_CONFIG
    if not os.path.exists(tokenizer_model) or not file.is_file():
        return []
    try:
        config = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    ids = config.get("eos_token_id") if isinstance(config, dict) else "?"
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(stop) is int for stop in ids):
        raise ValueError(f"{file}: eos_token_id must be one token id or a list; --stop-token-ids goes without it")
    return list(ids)


def _name(args: Namespace) -> str:
    name: str = args.tokenizer_model or args.tokenizer_type
    return name


def _found_stops(tokenizer: Any, *, name: str, chat_template: str | None, size: int) -> dict[int, list[str]]:
    """Stop ids below `size` with what says so, the tokenizer's own first."""
    sources: dict[str, list[int | None]] = {
        "the tokenizer": [tokenizer.eod],
        GENERATION_CONFIG: [*stops_of_generation_config(name)],
        "the chat template": [turn_end(tokenizer, chat_template or own_template(tokenizer))],
    }
    found: dict[int, list[str]] = {}
    for source, ids in sources.items():
        for stop in ids:
            if stop is not None and 0 <= stop < size:
                found.setdefault(stop, []).append(source)
    return found


def _remark(tokenizer: Any, found: dict[int, list[str]]) -> str:
    pieces = tokenizer.inv_vocab if getattr(tokenizer, "library", "") in ("huggingface", "sentencepiece") else {}
    ends = [f"{pieces.get(stop, 'token')} ({stop}, of {' and '.join(sources)})" for stop, sources in found.items()]
    return f"responses end at {', '.join(ends)}"
