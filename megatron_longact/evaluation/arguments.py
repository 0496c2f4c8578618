"""Flags of `longact evaluate` that Megatron does not have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from megatron_longact.flags import Flag, add_groups, ascending, config_from_flags
from megatron_longact.generation.vocabulary import StopFlags
from megatron_longact.megatron.tool_command import add_overwrite_arg
from megatron_longact.tasks.benchmarks import BENCHMARKS
from megatron_longact.tasks.longbench_v2 import Style
from megatron_longact.tasks.prompt_flags import PromptFlags

_SETTLED = ("tasks", "lengths", "temperature", "model_template", "sample_seed")
"""Fields that each benchmark has an answer to, or that its sampled responses are drawn with."""

STYLES: dict[str, Style] = {
    "0shot": "0shot",
    "cot": "0shot_cot",
    "no-context": "0shot_no_context",
    "rag": "0shot_rag",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(PromptFlags, StopFlags):
    """What is evaluated and how, from the flags; `config_from_args` checks it."""

    benchmark: Annotated[str, Flag(choices=tuple(BENCHMARKS))]
    """What the model is asked."""
    output: Path = Path("runs/evaluation")
    """Folder for results."""
    data: Path | None = None
    """LongBench v2: its JSON file; InfiniteBench: its folder. With --predictions: the samples to be answered."""
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK", needed=False)]
    """Of the benchmark. Default: all."""
    lengths: Annotated[tuple[int, ...], Flag(metavar="TOKENS", needed=False)]
    """RULER: context lengths, answers included (default: 4096). Needle: lengths of prompts (64 128 256)."""
    num_samples: int | None = None
    """Samples of a task and length (RULER 500, needle 32), or the first items of a file."""
    sample_seed: int = 42
    """RULER: seed of the samples, and of sampled responses."""
    tokens_to_generate: int | None = None
    """Not LongBench v2: instead of the task's own number; figures then do not compare."""
    keep_inputs: bool = False
    """Write prompts into predictions.jsonl, as RULER's scripts do."""
    style: Annotated[Style, Flag(choices=sorted(STYLES), parse=STYLES.__getitem__)] = "0shot"
    """LongBench v2: the prompt."""
    num_chunks: int = 0
    """LongBench v2 with --style rag: retrieved chunks of an item."""
    max_length: int | None = None
    """Tokens of a prompt; longer ones lose their middle. LongBench v2: 120000, InfiniteBench: 131072."""
    temperature: Annotated[float, Flag("--sampling-temperature", needed=False)]
    """0 is greedy. Default: the benchmark's (LongBench v2 0.1, others 0)."""


def add_evaluation_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    add_overwrite_arg(parser)
    return add_groups(parser, {"evaluation": EvaluationConfig})


def config_from_args(args: Namespace) -> EvaluationConfig:
    """The evaluation that the flags ask for; ValueError, in one line, for what makes no sense."""
    asked = BENCHMARKS[args.benchmark]
    config: EvaluationConfig = config_from_flags(
        EvaluationConfig,
        args,
        tasks=tuple(args.tasks or asked.TASKS),
        lengths=ascending(args.lengths or getattr(asked, "lengths", (4096,))),
        temperature=asked.TEMPERATURE if args.sampling_temperature is None else args.sampling_temperature,
    )
    _check(config)
    return config


def check_asked(config: EvaluationConfig) -> None:
    """Raise `ValueError`, when a model is asked, for a flag of other benchmarks, which this one would not read."""
    own, kinds = BENCHMARKS[config.benchmark], {kind.TITLE: _fields_of(kind) for kind in BENCHMARKS.values()}
    for field in fields(EvaluationConfig):
        theirs = [title for title, names in kinds.items() if field.name in names]
        given = field.name not in _SETTLED and getattr(config, field.name) != field.default
        if given and theirs and own.TITLE not in theirs:
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag} goes with {', '.join(theirs)}, not with --benchmark {config.benchmark}")


def _fields_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


def _check(config: EvaluationConfig) -> None:
    asked = BENCHMARKS[config.benchmark]
    unknown = [task for task in config.tasks if task not in asked.TASKS]
    if unknown:
        known = f"'s tasks are {', '.join(asked.TASKS)}" if asked.TASKS else " has no tasks to choose from"
        raise ValueError(f"--tasks has {unknown[0]!r}; {asked.TITLE}{known}")
    at_least_one = {
        "--num-samples": config.num_samples,
        "--tokens-to-generate": config.tokens_to_generate,
        "--max-length": config.max_length,
        "--lengths": min(config.lengths),
    }
    for flag, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    if config.temperature < 0:
        raise ValueError(f"--sampling-temperature is {config.temperature}; it must not be negative")
