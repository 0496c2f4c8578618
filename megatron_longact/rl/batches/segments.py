"""Rows in which responses to one prompt stand behind one copy of it: `[prompt | response 1 | … | response k]`, again.

Each response sees its prompt and, causally, itself; its positions go on from the prompt's end. Shapes: t tokens of a
row, n responses of it, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from megatron_longact.megatron.attention_plan import AttentionPlan, Piece, Span, length
from megatron_longact.tokens import TokenRules


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt in a row, and the responses that stand behind it."""

    prompt: Span
    responses: tuple[Span, ...]

    @property
    def pieces(self) -> list[Piece]:
        """What its tokens see; with one response it is an ordinary sequence."""
        if len(self.responses) == 1:
            whole = (self.prompt[0], self.responses[0][1])
            return [Piece(whole, (whole,))]
        return [Piece(self.prompt, (self.prompt,)), *(Piece(own, (self.prompt, own)) for own in self.responses)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of its sequences, the prompt included."""
        return [length(self.prompt) + length(own) for own in self.responses]


@dataclass(frozen=True)
class SharedRow:
    """The groups of a row of t tokens; behind the last is padding."""

    groups: tuple[SharedPrompt, ...]
    num_tokens: int

    @property
    def end(self) -> int:
        """Tokens that are no padding."""
        return self.groups[-1].responses[-1][1]

    @property
    def first_responses(self) -> list[int]:
        """The number of each group's first response."""
        return [0, *accumulate(len(group.responses) for group in self.groups[:-1])]

    @property
    def plan(self) -> AttentionPlan:
        """Of its attention; padding is a sequence of its own."""
        pieces = [piece for group in self.groups for piece in group.pieces]
        padding = (self.end, self.num_tokens)
        return AttentionPlan((*pieces, *([Piece(padding, (padding,))] if length(padding) else [])))

    @property
    def positions(self) -> Tensor:
        """Of each token in its sequence: int64 [t]."""
        parts = []
        for group in self.groups:
            prompt = length(group.prompt)
            parts += [torch.arange(prompt), *(torch.arange(prompt, prompt + length(own)) for own in group.responses)]
        return torch.cat([*parts, torch.arange(self.num_tokens - self.end)])

    def predicting(self, num_tokens: int) -> Tensor:
        """Where the tokens stand that predict those of each response: int64 [n, num_tokens].

        The first is predicted at the prompt's last token; what is behind a response's end is within the row.
        """
        behind = torch.arange(num_tokens - 1)
        places = [
            torch.cat([torch.tensor([group.prompt[1] - 1]), own[0] + behind])
            for group in self.groups
            for own in group.responses
        ]
        return torch.stack(places).clamp(max=self.num_tokens - 1)

    def weights(self, rules: TokenRules) -> Tensor:
        """How often each token counts where no prompt was shared: fp32 [1, t].

        A prompt's tokens count once for each of its sequences that fulfils the rules.
        """
        weights = torch.zeros(self.num_tokens)
        for group in self.groups:
            counted = [int(tokens >= rules.min_context) for tokens in group.lengths]
            weights[slice(*group.prompt)] = sum(counted)
            for own, count in zip(group.responses, counted, strict=True):
                weights[slice(*own)] = count
        return weights.masked_fill_(self.positions < rules.skip_first_tokens, 0.0)[None]


def shared_row(prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, num_tokens: int) -> SharedRow:
    """The row of n responses of these lengths: neighbours whose prompts are equal share one copy.

    num_tokens: t, at least what they take.
    """
    groups, place, rows = [], 0, range(len(lengths))
    for _, mates in groupby(rows, key=lambda row: prompts[row]):
        own = list(mates)
        sizes = [len(prompts[own[0]]), *(lengths[row] for row in own)]
        prompt, *responses = pairwise(accumulate(sizes, initial=place))
        groups.append(SharedPrompt(prompt, tuple(responses)))
        place += sum(sizes)
    return SharedRow(tuple(groups), num_tokens)
