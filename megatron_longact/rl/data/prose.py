"""Text whose perplexity says what training forgets: windows of a file, or of the built-in prose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_longact.flags import Flag
from megatron_longact.tasks.needle import Tokenizer, sentences_of
from megatron_longact.tasks.pieces import PieceEncoder


@dataclass(frozen=True, kw_only=True)
class ProseConfig:
    """Whose perplexity stands beside the held-out accuracy; ValueError for numbers that make no sense."""

    windows: Annotated[int, Flag("--eval-prose-windows")] = 0
    """Windows of prose whose perplexity is measured at each evaluation, beside the held-out tasks: what training
    forgets. Default: 0, none."""

    tokens: Annotated[int, Flag("--eval-prose-tokens")] = 512
    """Tokens of such a window."""

    file: Annotated[Path | None, Flag("--eval-prose")] = None
    """A text to take them from, one behind the other. Default: built-in prose."""

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise ValueError(f"--eval-prose-windows is {self.windows}; it must be 0 or more")
        if self.tokens < 2:
            raise ValueError(f"--eval-prose-tokens is {self.tokens}; a window needs at least 2")


def text_windows(path: Path | None, tokenizer: Tokenizer, *, length: int, count: int) -> list[list[int]]:
    """The first `count` windows of `length` tokens of a file, or of the built-in prose; ValueError for fewer.

    Each begins with what the tokenizer begins a text with (`<s>`), if anything.
    """
    try:
        text = path.read_text("utf-8") if path else " ".join(sentences_of("heldout"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    pieces = PieceEncoder(tokenizer.tokenize)
    ids, own = pieces.piece(text), length - len(pieces.prefix)
    if len(ids) < own * count or own < 1:
        raise ValueError(
            f"{path or 'the built-in prose'} has {len(ids)} tokens, fewer than {count} windows of {length}; ask "
            "for fewer, or shorter ones"
        )
    return [pieces.prefix + ids[i * own : (i + 1) * own] for i in range(count)]
