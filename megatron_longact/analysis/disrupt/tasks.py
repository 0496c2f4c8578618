"""What a disturbed model is asked, what it answers, and how good and how repetitive the answers are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_longact.analysis.disrupt.arguments import DisruptConfig
from megatron_longact.analysis.disrupt.repetition import distinct_ratio, longest_loop, loop_share
from megatron_longact.generation.engine import Prompt, RolloutEngine
from megatron_longact.generation.sampling import Sampling
from megatron_longact.tasks.benchmark import Benchmark, Encoder, Sample
from megatron_longact.tasks.benchmarks import benchmark_from
from megatron_longact.tasks.intervals import METHOD, percent_interval
from megatron_longact.tasks.needle import Split
from megatron_longact.tasks.ruler import TASKS

NGRAM = 3

Row = dict[str, Any]
"""A response: `task`, `length` (nominal), `index`, `input`, `pred`, `outputs`, and what `responses` adds."""


def benchmark_of(config: DisruptConfig, **others: Any) -> Benchmark:
    """The benchmark of `--benchmark`; others: settings instead of the config's."""
    return benchmark_from(config.benchmark, {**vars(config), "keep_inputs": True, **others})


def official_tokens(config: DisruptConfig) -> dict[str, int]:
    """Tokens of a response that the benchmark itself gives its tasks; the needle tasks have no such number."""
    known = TASKS if config.benchmark == "ruler" else {}
    return {task: known[task].tokens_to_generate for task in config.tasks if task in known}


def scored_samples(config: DisruptConfig, tokenizer: Encoder, *, positions: int) -> list[Sample]:
    """The prompts that are scored; ValueError for what does not fit into the model."""
    return _samples(config, tokenizer, "heldout", config.num_samples, config.sample_seed, positions=positions)


def measured_samples(config: DisruptConfig, tokenizer: Encoder, *, positions: int) -> list[Sample]:
    """Other prompts of the same tasks and lengths, to measure channels on."""
    return _samples(config, tokenizer, "train", config.measure_samples, config.sample_seed + 1, positions=positions)


def _samples(
    config: DisruptConfig, tokenizer: Encoder, split: Split, count: int, seed: int, *, positions: int
) -> list[Sample]:
    asked = benchmark_of(config, num_samples=count, sample_seed=seed, split=split)
    groups = asked.samples(tokenizer, positions=positions)
    return [sample for group in groups for sample in group.make()]


def responses(
    samples: Sequence[Sample],
    engine: RolloutEngine,
    *,
    chunk: int,
    detokenize: Callable[[list[int]], str],
    score: Callable[[Row], float],
) -> Iterator[list[Row]]:
    """Greedy responses, `chunk` at a time, in order of length; called by all ranks alike.

    A row has the response's `tokens`, whether it `finished` by itself, its `score` in percent, and of its tokens the
    ratio of different trigrams (`distinct`, None if it has none), the `loop` in tokens and the `loop_share`.
    """
    order = sorted(samples, key=lambda sample: (sample.tokens_to_generate, len(sample.tokens)))
    for begin in range(0, len(order), chunk):
        part = order[begin : begin + chunk]
        sampling = Sampling(max_response_length=max(s.tokens_to_generate for s in part), greedy=True)
        made = engine.generate([Prompt(tuple(s.tokens), index=begin + i) for i, s in enumerate(part)], sampling)
        rows = []
        for i, sample in enumerate(part):
            length = int(made.lengths[i]) - int(made.finished[i])
            ids = made.tokens[i, : min(length, sample.tokens_to_generate)].tolist()
            row = sample.answered(detokenize(ids))
            row |= {"tokens": len(ids), "finished": bool(made.finished[i]), "score": score(row)}
            row |= {"distinct": distinct_ratio(ids, NGRAM), "loop": longest_loop(ids), "loop_share": loop_share(ids)}
            rows.append(row)
        yield rows


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over responses: accuracy by length and in all, percent, with intervals; repetition; the responses' length.

    The intervals are those of `interval`.
    """
    lengths = sorted({row["max_seq_length"] for row in rows})
    scores = {str(n): [row["score"] for row in rows if row["max_seq_length"] == n] for n in lengths}
    accuracy = statistics.fmean(row["score"] for row in rows)
    means = {n: statistics.fmean(own) for n, own in scores.items()}
    distinct = [row["distinct"] for row in rows if row["distinct"] is not None]
    return {
        "accuracy": accuracy,
        "accuracy_by_length": means,
        "interval": METHOD,
        "accuracy_interval": percent_interval(accuracy, len(rows)),
        "accuracy_interval_by_length": {n: percent_interval(mean, len(scores[n])) for n, mean in means.items()},
        "samples_by_length": {n: len(own) for n, own in scores.items()},
        f"distinct_{NGRAM}": statistics.fmean(distinct) if distinct else None,
        "longest_loop": statistics.fmean(row["loop"] for row in rows),
        "loop_share": 100 * statistics.fmean(row["loop_share"] for row in rows),
        "unfinished": 100 * statistics.fmean(not row["finished"] for row in rows),
        "response_tokens": statistics.fmean(row["tokens"] for row in rows),
    }
