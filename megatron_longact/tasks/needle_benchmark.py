"""The needle tasks of the RL program as a benchmark: prompts of an exact length, right or wrong as a whole."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_longact.tasks import by_length
from megatron_longact.tasks.benchmark import Encoder, Group, Report, Sample
from megatron_longact.tasks.needle import NEEDLE_TASKS, NeedleGenerator, Split, exact_match
from megatron_longact.tasks.rows import Id, Row, by_id, check_consecutive, field, read_rows

SAMPLES = 32
TOKENS_TO_GENERATE = 32
"""A right answer of the demo's model has at most 13."""


@dataclass(frozen=True)
class _Tokenizer:
    encoder: Encoder

    def tokenize(self, text: str) -> list[int]:
        return self.encoder.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self.encoder.decode(ids)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """The needle tasks, asked at lengths of a prompt; see `tasks.benchmark.Benchmark`."""

    TITLE: ClassVar[str] = "needle"
    TASKS: ClassVar[Sequence[str]] = tuple(NEEDLE_TASKS)
    TEMPERATURE: ClassVar[float] = 0.0

    tasks: Sequence[str] = tuple(NEEDLE_TASKS)
    lengths: Sequence[int] = (64, 128, 256)
    num_samples: int | None = None
    sample_seed: int = 42
    tokens_to_generate: int | None = None
    split: Split = "heldout"

    def samples(self, tokenizer: Encoder, *, positions: int) -> list[Group]:
        """See `Benchmark`: a group is a task at a length."""
        answer = self.tokens_to_generate or TOKENS_TO_GENERATE
        if max(self.lengths) + answer > positions:
            raise ValueError(
                f"--lengths {max(self.lengths)} and {answer} tokens to generate do not fit into the model's "
                f"{positions} positions"
            )
        generator = NeedleGenerator(
            _Tokenizer(tokenizer), tasks=self.tasks, lengths=self.lengths, split=self.split, seed=self.sample_seed
        )
        return [self._group(generator, task, length, answer) for length in self.lengths for task in self.tasks]

    @property
    def longest_prompt(self) -> int:
        """See `Benchmark`."""
        return max(self.lengths)

    def check_lengths(self, tokenizer: Encoder) -> None:
        """See `Benchmark`: what is too short is refused when samples are made, at once."""

    def prompt(self, item: Mapping[str, Any]) -> str:
        """See `Benchmark`."""
        return str(item["input"])

    def postprocess(self, row: Row) -> str:
        """See `Benchmark`."""
        return by_length.prediction_of(row).strip()

    def score(self, row: Row) -> float:
        """100 if the numbers of the response are those asked for and no others, else 0."""
        return 100.0 * exact_match(by_length.prediction_of(row), [str(answer) for answer in field(row, "outputs")])

    def report(self, rows: Mapping[Id, Row]) -> Report:
        """See `by_length.report`."""
        return by_length.report(
            rows,
            name="needle",
            title="Needle tasks",
            categories={task: [task] for task in self.TASKS},
            score=lambda _, own: round(statistics.fmean(self.score(row) for row in own), 2),
            postprocess=self.postprocess,
        )

    def by_id(self, rows: Sequence[Row], *, what: str) -> dict[Id, Row]:
        """Rows by (max_seq_length, task, index)."""
        return by_id(by_length.placed(rows, self.TASKS), by_length.ID, what=what)

    def check_whole(self, rows: Mapping[Id, Row]) -> None:
        """See `Benchmark`: the indices of each task and length must be 0, 1, 2 and so on."""
        check_consecutive(rows)

    def answers(self, data: Path) -> dict[Id, Row]:
        """See `Benchmark`."""
        rows = self.by_id(read_rows(data), what="samples of --data")
        return {each: {"outputs": field(row, "outputs")} for each, row in rows.items()}

    def _group(self, generator: NeedleGenerator, task: str, length: int, answer: int) -> Group:
        def make(index: int) -> Sample:
            made = generator.sample(length, index, task=task, length=length)
            item = {"input": made.prompt, "outputs": list(made.references)}

            def answered(response: str) -> Row:
                return {"task": task, "max_seq_length": length, "index": index, "pred": response, **item}

            return Sample((length, task, index), array("i", made.prompt_ids), answer, answered)

        count = self.num_samples or SAMPLES
        ids = tuple((length, task, i) for i in range(count))
        return Group(f"{task} at {length}", ids, lambda: [make(i) for i in range(count)])
