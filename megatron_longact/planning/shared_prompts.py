"""What it saves to compute a prompt once for the responses of a row, and what its keys and values cost: arithmetic.

A row is `[prompt | response | ... | response]`. Each response attends to the whole prompt and to itself, for which K
and V of the prompt are gathered in front of its own. A group that does not fit into a row is cut; then its prompt
stands in each of its rows.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.planning.roofline import Assumptions, flops
from megatron_longact.planning.run_shape import Attention, Batch, Parallel


@dataclass(frozen=True, kw_only=True)
class Group:
    """The responses to one prompt, and the rows that hold them. Raises `ValueError` for what fits into no row."""

    prompt: int
    response: int
    """On average."""
    size: int
    row: int
    """Tokens that a row holds, `--seq-length` of the RL program."""

    def __post_init__(self) -> None:
        for name, value in (("--response-length", self.response), ("--group-size", self.size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if self.prompt < 1:
            length = self.prompt + self.response
            raise ValueError(f"--response-length {self.response} leaves no prompt in --seq-length {length}")
        if self.prompt + self.response > self.row:
            raise ValueError(
                f"--row-length is {self.row}; a prompt of {self.prompt} tokens and a response of {self.response} do "
                "not fit"
            )

    @property
    def responses_of_rows(self) -> list[int]:
        """Responses in each row of the group: as few rows as hold it, and as equal as they can be."""
        rows = -(-self.size // ((self.row - self.prompt) // self.response))
        return [self.size // rows + (row < self.size % rows) for row in range(rows)]

    @property
    def outputs(self) -> int:
        """Tokens whose logits are made: those of the responses."""
        return self.size * self.response

    @property
    def apart(self) -> "Work":
        """Each response with a prompt of its own."""
        length = self.prompt + self.response
        return Work(self.size * length, self.size * _causal(length))

    @property
    def shared(self) -> "Work":
        """A prompt once a row."""
        rows, prompt, response = len(self.responses_of_rows), self.prompt, self.response
        pairs = rows * _causal(prompt) + self.size * (response * prompt + _causal(response))
        return Work(rows * prompt + self.outputs, pairs)

    def gathered_keys(self, responses: int, *, cp: int) -> int:
        """Keys of a row of so many responses after the gather, on the context-parallel rank that has most of them.

        Under context parallelism a rank has two chunks of 2 cp, as Megatron cuts a sequence; what it has of a response
        sees the prompt, and the response up to there.
        """
        ends = list(accumulate([self.prompt, *[self.response] * responses]))
        bounds = [0, *ends]
        if cp == 1:
            return self._keys((0, ends[-1]), bounds)
        chunks = [self._keys(span, bounds) for span in pairwise(ends[-1] * i // (2 * cp) for i in range(2 * cp + 1))]
        return max(chunks[rank] + chunks[-1 - rank] for rank in range(cp))

    def _keys(self, span: tuple[int, int], bounds: list[int]) -> int:
        held = [(begin, min(end, span[1])) for begin, end in pairwise(bounds) if begin < span[1] and end > span[0]]
        return sum(end - begin + (self.prompt if begin else 0) for begin, end in held)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What is said of shared prompts; a field's docstring is its flag's help."""

    group_size: int | None = None
    """Responses to a prompt, which is computed once: say what that saves."""
    response_length: int | None = None
    """With --group-size: tokens of a response, on average; the rest of --seq-length is its prompt."""
    row_length: int | None = None
    """With --group-size: tokens of a packed row. Not given: as many as a whole group has."""

    def group(self, seq_length: int) -> Group | None:
        """The groups of a step; None where nothing was said, `ValueError` where one thing is missing."""
        size, response = self.group_size, self.response_length
        if size is None and response is None and self.row_length is None:
            return None
        if size is None or response is None:
            raise ValueError("shared prompts need both --group-size and --response-length")
        prompt = seq_length - response
        whole = prompt + size * response
        return Group(prompt=prompt, response=response, size=size, row=self.row_length or whole)


@dataclass(frozen=True)
class Work:
    """What a group computes."""

    tokens: int
    pairs: float
    """Queries times the keys that they see."""


@dataclass(frozen=True)
class Savings:
    """A step without sharing and with it, on all GPUs; and on one rank what the gather makes."""

    group: Group
    rows: int
    tokens: tuple[int, int]
    flops: tuple[float, float]
    seconds: tuple[float, float]
    """Of the dense step by the roofline."""
    gathered_at_once: int
    """Bytes of K and V after the gather of one layer, of the largest row: held beside a layer's activations."""
    gathered: int
    """The same of all layers and rows of a rank in the forwards of a step; recomputation and backward do it again."""
    sent: int
    """Bytes of K and V that a rank sends to its context-parallel ranks in the forwards of a step."""

    def as_json(self) -> dict[str, Any]:
        """All numbers; pairs are without sharing and with it."""
        return asdict(self) | {"responses_of_rows": self.group.responses_of_rows}


def savings(model: HFModel, parallel: Parallel, batch: Batch, group: Group, *, assumed: Assumptions) -> Savings:
    """What sharing saves in a step of `batch.global_batch_size` responses.

    Raises `ValueError` if these are no whole groups, or the groups do not divide over the replicas.
    """
    if batch.global_batch_size % (group.size * parallel.dp):
        raise ValueError(
            f"--global-batch-size {batch.global_batch_size} is no multiple of --group-size {group.size} x data "
            f"parallel size {parallel.dp}"
        )
    groups, responses = batch.global_batch_size // group.size, group.responses_of_rows
    made = [
        flops(model, tokens=groups * work.tokens, pairs=groups * work.pairs, outputs=groups * group.outputs)
        for work in (group.apart, group.shared)
    ]
    key = key_bytes(Attention.of(model), parallel, batch)
    times = groups // parallel.dp * max(parallel.stages(model.num_layers))
    per_row = [group.gathered_keys(n, cp=parallel.cp) * key for n in responses]
    return Savings(
        group=group,
        rows=groups * len(responses),
        tokens=(groups * group.apart.tokens, groups * group.shared.tokens),
        flops=(made[0], made[1]),
        seconds=(assumed.seconds(made[0], parallel, batch), assumed.seconds(made[1], parallel, batch)),
        gathered_at_once=max(per_row),
        gathered=times * sum(per_row),
        sent=times * group.shared.tokens * key * (parallel.cp - 1) // parallel.cp,
    )


def key_bytes(attention: Attention, parallel: Parallel, batch: Batch) -> int:
    """Bytes of K and V of one token on a rank, in one layer."""
    layout = attention.layout
    return 2 * max(layout.num_query_groups // parallel.tp, 1) * layout.kv_channels * batch.activation_bytes


def _causal(length: int) -> float:
    """Query-key pairs of a causal sequence, as the roofline counts them."""
    return length * length / 2
