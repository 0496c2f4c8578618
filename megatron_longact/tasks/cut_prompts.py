"""Prompts that lose their middle where they are too long for a model, in the model's template."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from megatron_longact.tasks.benchmark import Encoder
from megatron_longact.tasks.pieces import TASK_TEMPLATE, PieceEncoder


def truncate(token_ids: Sequence[int], max_length: int) -> list[int]:
    """The ids with the middle cut out, so that `max_length` are left; all of them if they are no more.

    Of an odd `max_length` the end has one more than the beginning. Raises ValueError if it is below 1: the slices of
    the official scripts then keep everything.
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; a prompt needs at least 1 token")
    ids = list(token_ids)
    if len(ids) <= max_length:
        return ids
    beginning = max_length // 2
    return ids[:beginning] + ids[len(ids) - (max_length - beginning) :]


class CutPrompts:
    """Turns prompts into tokens: cut in the middle to `max_length`, then put into the template.

    positions: how many tokens, `tokens_to_generate` included, the model takes. max_length: None for the benchmark's
    `official` one, or what the model has room for. Raises ValueError for what does not fit into the model.
    """

    def __init__(
        self,
        tokenizer: Encoder,
        *,
        template: str,
        positions: int,
        tokens_to_generate: int,
        max_length: int | None,
        official: int,
    ) -> None:
        self.pieces = PieceEncoder(tokenizer.encode)
        self.tokens_to_generate = tokens_to_generate
        before, after = template.split(TASK_TEMPLATE)
        self.before, self.after = (self.pieces.piece(text) if text else [] for text in (before, after))
        room = positions - tokens_to_generate - len(self.before) - len(self.after)
        if room < 1:
            raise ValueError(
                f"{tokens_to_generate} tokens to generate leave no room for a prompt among {positions} positions"
            )
        self.max_length = min(official, room) if max_length is None else max_length
        if self.max_length > room:
            raise ValueError(
                f"a prompt of {self.max_length} tokens with {tokens_to_generate} to generate does not fit into the "
                f"model's {positions} positions; --max-length can be at most {room}"
            )

    def tokens(self, prompt: str) -> array[int]:
        """The ids that the model is given for a prompt."""
        ids = truncate(self.pieces.prompt(prompt), self.max_length)
        ids = ids[len(self.pieces.prefix) :] if self.pieces.begins(ids) else ids
        return array("i", self.pieces.begun([*self.before, *ids, *self.after]))
