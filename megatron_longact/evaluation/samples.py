"""What a model is to answer: the samples of a benchmark as tokens, group by group, made when they are needed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_longact.evaluation.arguments import EvaluationConfig
from megatron_longact.evaluation.predictions import Id, Row, longbench_reference, longbench_rows, read_rows
from megatron_longact.tasks import longbench_v2, ruler
from megatron_longact.tasks.pieces import PieceEncoder
from megatron_longact.tasks.ruler.generation import TASK_TEMPLATE

RULER_SAMPLES = 500
LONGBENCH_GROUP = 64
"""Items that are tokenized at once: before it is cut an item can have millions of tokens."""


class Encoder(Protocol):
    """A tokenizer as the benchmarks want it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around it, if any."""
        ...


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


def groups_of(config: EvaluationConfig, tokenizer: Encoder, *, positions: int) -> list[Group]:
    """All groups of an evaluation; positions: how many tokens, answer included, the model takes.

    Raises ValueError for what does not fit into the model, and for a file that is not the benchmark's.
    """
    pieces = PieceEncoder(tokenizer.encode)
    if config.benchmark == "ruler":
        return list(_ruler_groups(config, pieces, positions=positions))
    return _longbench_groups(config, pieces, positions=positions)


def _ruler_groups(config: EvaluationConfig, pieces: PieceEncoder, *, positions: int) -> Iterator[Group]:
    if max(config.lengths) > positions:
        raise ValueError(f"--lengths asks for {max(config.lengths)} tokens, but the model has {positions} positions")
    count = config.num_samples or RULER_SAMPLES
    for length in config.lengths:
        for task in config.tasks:
            yield Group(
                f"{task} at {length}",
                tuple((length, task, i) for i in range(count)),
                lambda task=task, length=length: _ruler_samples(config, pieces, task, length, count),  # type: ignore[misc]
            )


def check_tasks(config: EvaluationConfig, tokenizer: Encoder) -> None:
    """ValueError for RULER's tasks that the shortest of the lengths cannot hold, with those that it can."""
    if config.benchmark != "ruler":
        return
    pieces, length = PieceEncoder(tokenizer.encode), min(config.lengths)
    count = config.num_samples or RULER_SAMPLES
    least = {
        task: ruler.least_length(task, num_samples=count, max_seq_length=length, **_ruler_settings(config, pieces))
        for task in config.tasks
    }
    needed = ", ".join(f"{task} (needs {tokens})" for task, tokens in least.items() if tokens > length)
    if needed:
        fit = " ".join(task for task, tokens in least.items() if tokens <= length)
        rest = f"these fit: --tasks {fit}" if fit else "give longer --lengths"
        raise ValueError(f"--lengths {length}: {needed} do not fit into {length} tokens with this tokenizer; {rest}")


def _ruler_settings(config: EvaluationConfig, pieces: PieceEncoder) -> dict[str, Any]:
    return {
        "tokenizer": pieces,
        "seed": config.sample_seed,
        "tokens_to_generate": config.tokens_to_generate,
        "model_template": config.model_template,
        "essays": config.essays,
        "words": config.words,
        "squad": config.squad,
        "hotpotqa": config.hotpotqa,
    }


def _ruler_samples(config: EvaluationConfig, pieces: PieceEncoder, task: str, length: int, count: int) -> list[Sample]:
    made = ruler.generate(
        task,
        num_samples=count,
        max_seq_length=length,
        **_ruler_settings(config, pieces),
    )
    return [_ruler_sample(config, pieces, task, length, sample) for sample in made]


def _ruler_sample(
    config: EvaluationConfig, pieces: PieceEncoder, task: str, length: int, sample: Mapping[str, Any]
) -> Sample:
    prompt = sample["input"] + sample["answer_prefix"]

    def answered(response: str) -> Row:
        row = {"task": task, "max_seq_length": length, "index": sample["index"], "pred": response}
        row |= {"input": prompt} if config.keep_inputs else {}
        return row | {name: sample[name] for name in ("outputs", "others", "length")} | {"truncation": -1}

    return Sample(
        (length, task, sample["index"]),
        array("i", pieces.prompt(prompt)),
        config.tokens_to_generate or ruler.TASKS[task].tokens_to_generate,
        answered,
    )


def _longbench_groups(config: EvaluationConfig, pieces: PieceEncoder, *, positions: int) -> list[Group]:
    if config.data is None:
        raise ValueError("--benchmark longbench-v2 needs its file: --data data.json")
    rows = longbench_rows(read_rows(config.data), what="items of --data").values()
    items = list(rows)[: config.num_samples]
    if not items:
        raise ValueError(f"{config.data} holds no items")
    prompts = _LongBenchPrompts(config, pieces, positions=positions)
    for item in items:
        prompts.check(item)
    return [prompts.group(items[i : i + LONGBENCH_GROUP]) for i in range(0, len(items), LONGBENCH_GROUP)]


class _LongBenchPrompts:
    """Turns items into samples: built, cut in the middle, and put into the model's template."""

    def __init__(self, config: EvaluationConfig, pieces: PieceEncoder, *, positions: int) -> None:
        self.config, self.pieces = config, pieces
        before, after = config.model_template.split(TASK_TEMPLATE)
        self.before, self.after = (pieces.piece(text) if text else [] for text in (before, after))
        cot = config.style == "0shot_cot"
        self.answer_tokens = longbench_v2.TOKENS_TO_GENERATE_COT if cot else longbench_v2.TOKENS_TO_GENERATE
        room = positions - self.answer_tokens - len(self.before) - len(self.after)
        if room < 1:
            raise ValueError(
                f"{self.answer_tokens} tokens to generate leave no room for a prompt among {positions} positions"
            )
        self.max_length = min(longbench_v2.MAX_LENGTH, room) if config.max_length is None else config.max_length
        if self.max_length > room:
            raise ValueError(
                f"a prompt of {self.max_length} tokens with {self.answer_tokens} to generate does not fit into the "
                f"model's {positions} positions; --max-length can be at most {room}"
            )

    def check(self, item: Row) -> None:
        """Raise ValueError for an item that lacks what the prompt or the score needs."""
        missing = [name for name in ("answer", "difficulty", "length") if name not in item]
        if missing:
            raise ValueError(f"item {item['_id']!r} of {self.config.data} has no {missing[0]!r}")
        longbench_reference(item)
        longbench_v2.build_prompt(item, style=self.config.style, num_chunks=self.config.num_chunks)

    def group(self, items: Sequence[Row]) -> Group:
        """The items as a group."""
        ids = tuple((item["_id"],) for item in items)
        return Group("LongBench v2", ids, lambda: [self._first(item) for item in items])

    def _first(self, item: Row) -> Sample:
        prompt = longbench_v2.build_prompt(item, style=self.config.style, num_chunks=self.config.num_chunks)
        if self.config.style != "0shot_cot":
            return self._sample(item, prompt, longbench_v2.TOKENS_TO_GENERATE, {})
        first = self._sample(item, prompt, longbench_v2.TOKENS_TO_GENERATE_COT, {})
        return Sample(
            first.id, first.tokens, first.tokens_to_generate, first.answered, lambda text: self._ask(item, text)
        )

    def _ask(self, item: Row, reasoning: str) -> Sample:
        reasoning = reasoning.strip()
        prompt = longbench_v2.build_prompt(item, style="0shot_cot_ans", reasoning=reasoning)
        return self._sample(item, prompt, longbench_v2.TOKENS_TO_GENERATE, {"response_cot": reasoning})

    def _sample(self, item: Row, prompt: str, tokens_to_generate: int, extra: Row) -> Sample:
        ids = longbench_v2.truncate(self.pieces.prompt(prompt), self.max_length)
        ids = ids[len(self.pieces.prefix) :] if self.pieces.begins(ids) else ids
        whole = self.pieces.begun([*self.before, *ids, *self.after])

        def answered(response: str) -> Row:
            response = response.strip()
            pred = longbench_v2.extract_answer(response)
            kept = {name: item[name] for name in item if name not in ("context", "retrieved_context", "_file")}
            context = {"context": item["context"][:1000]} if "context" in item else {}
            judged = {"response": response, "pred": pred, "judge": pred == item["answer"]}
            return kept | context | extra | judged

        return Sample((item["_id"],), array("i", whole), tokens_to_generate, answered)
