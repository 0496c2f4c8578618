"""What every benchmark has in common: the protocol, the samples that a model is asked, and what is reported.

A benchmark is one class, whose fields are the settings that it can be asked with, and its line in
`megatron_longact.tasks.benchmarks`. Evaluation, scoring of files, disruption and their tables and pictures know no more
of it than stands here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_longact.tasks.needle import Tokenizer
from megatron_longact.tasks.rows import Id, Row

Results = dict[str, Any]


class Encoder(Protocol):
    """A tokenizer as the benchmarks want it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around it, if any."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; only the needle tasks ask for it."""
        ...


class MegatronEncoder:
    """A Megatron tokenizer under the names of `Encoder`; encode: instead of its own."""

    def __init__(self, tokenizer: Tokenizer, *, encode: Callable[[str], list[int]] | None = None) -> None:
        self._tokenizer = tokenizer
        self._encode = tokenizer.tokenize if encode is None else encode

    def encode(self, text: str) -> list[int]:
        """See `Encoder`."""
        return list(self._encode(text))

    def decode(self, ids: list[int]) -> str:
        """See `Encoder`."""
        return self._tokenizer.detokenize(ids)


@dataclass(frozen=True)
class Sample:
    """One prompt, and the row of its prediction.

    tokens: 32-bit integers; a group can have a hundred million. answered: turns the response into the row of the
    prediction. follow_up: turns it into the sample that asks again instead (chain of thought).
    """

    id: Id
    tokens: array[int]
    tokens_to_generate: int
    answered: Callable[[str], Row]
    follow_up: Callable[[str], Sample] | None = None


@dataclass(frozen=True)
class Group:
    """Samples that belong together: how many, what they are called, and how to make them."""

    name: str
    ids: tuple[Id, ...]
    make: Callable[[], list[Sample]]


@dataclass(frozen=True)
class Table:
    """Figures for the screen: `lines` under `heads`, a rule before the line that begins with `rule_before`, notes."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str]
    rule_before: str = ""


@dataclass(frozen=True)
class Bars:
    """A picture of one value in percent a name; names of a group have shades of one colour.

    counts: samples of each name. chance: what guessing gives, if that can be said. lying: for many or long names.
    """

    title: str
    axis: str
    groups: Sequence[Sequence[str]]
    values: Mapping[str, float | None]
    counts: Mapping[str, int]
    chance: float | None = None
    lying: bool = False


@dataclass(frozen=True)
class Curves:
    """A picture of percents by length: categories and their mean as curves, every task as numbers."""

    title: str
    lengths: Sequence[str]
    categories: Mapping[str, Sequence[float | None]]
    means: Sequence[float]
    tasks: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Report:
    """Scores of all predictions: `results` for JSON, the same as a table and as a picture."""

    results: Results
    table: Table
    picture: Bars | Curves


class Benchmark(Protocol):
    """A benchmark as it is asked. The class is a dataclass of its settings, by the names of the flags that set them."""

    TITLE: ClassVar[str]
    TASKS: ClassVar[Sequence[str]]
    """What `--tasks` can choose from; none for a benchmark without tasks."""
    TEMPERATURE: ClassVar[float]
    """The official one; 0 is greedy."""

    def samples(self, tokenizer: Encoder, *, positions: int) -> list[Group]:
        """All samples, group by group; positions: how many tokens, answer included, the model takes.

        Raises ValueError for what does not fit into the model, and for a file that is not the benchmark's.
        """
        ...

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, or a little more; 0 if that is not known before they are made."""
        ...

    def check_lengths(self, tokenizer: Encoder) -> None:
        """ValueError for lengths that cannot hold their samples, found without making these."""
        ...

    def prompt(self, item: Mapping[str, Any]) -> str:
        """What the model is asked, without the model's template."""
        ...

    def postprocess(self, row: Row) -> str | None:
        """The answer of a prediction as it is scored; ValueError for a row that can hold none."""
        ...

    def score(self, row: Row) -> float:
        """Percent for the answer of a prediction."""
        ...

    def report(self, rows: Mapping[Id, Row]) -> Report:
        """The figures of all predictions; ValueError for a row without what its score needs."""
        ...

    def by_id(self, rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
        """Rows by the id of their sample; ValueError for a doubled one or none. what: for messages, "predictions"."""
        ...

    def check_whole(self, rows: Mapping[Id, Row]) -> None:
        """ValueError for gaps that predictions show by themselves, without the samples."""
        ...

    def answers(self, data: Path) -> dict[Id, Row]:
        """By id, what the samples of a file tell of their predictions: the right answers and what the report needs."""
        ...


def percent(value: float | None, *, digits: int) -> str:
    """A figure of a table; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def counted_as(count: int, noun: str) -> str:
    """`1 item`, `2 items`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def other_lengths(asked: int | None, official: Mapping[str, int]) -> list[str]:
    """A note of a table, if answers may have another length than the benchmark gives them; official: by task."""
    changed = {task: tokens for task, tokens in official.items() if asked not in (None, tokens)}
    if not changed:
        return []
    own = ", ".join(f"{task} {tokens}" for task, tokens in changed.items())
    return [f"CHANGED: answers have at most {asked} tokens, officially {own}: figures do not compare with others'"]
