"""Flags of `tools/evaluate.py` that Megatron does not have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_longact.generation.vocabulary import add_stop_args
from megatron_longact.megatron.tool_command import add_overwrite_arg
from megatron_longact.tasks.benchmarks import BENCHMARKS
from megatron_longact.tasks.longbench_v2 import Style
from megatron_longact.tasks.pieces import TASK_TEMPLATE

STYLES: dict[str, Style] = {
    "0shot": "0shot",
    "cot": "0shot_cot",
    "no-context": "0shot_no_context",
    "rag": "0shot_rag",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated and how, from the flags; `config_from_args` checks it."""

    benchmark: str
    output: Path
    data: Path | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_samples: int | None
    sample_seed: int
    tokens_to_generate: int | None
    model_template: str
    essays: Path | None
    words: Path | None
    squad: Path | None
    hotpotqa: Path | None
    keep_inputs: bool
    style: Style
    num_chunks: int
    max_length: int | None
    temperature: float


def add_evaluation_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    group = parser.add_argument_group(title="evaluation")
    add = group.add_argument
    add("--benchmark", required=True, choices=list(BENCHMARKS))
    add("--output", type=Path, default=Path("runs/evaluation"), help="Folder for results. Default: runs/evaluation.")
    add(
        "--data",
        type=Path,
        help="longbench-v2: its JSON file. With --predictions: the samples that were to be answered.",
    )
    add("--tasks", nargs="+", metavar="TASK", help="Of the benchmark. Default: all.")
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="RULER: context lengths, answers included (default: 4096). Needle: lengths of prompts (64 128 256).",
    )
    add(
        "--num-samples",
        type=int,
        help="Samples of a task and length (RULER 500, needle 32), or the first items of a file.",
    )
    add(
        "--sample-seed", type=int, default=42, help="RULER: seed of the samples, and of sampled responses. Default: 42."
    )
    add(
        "--tokens-to-generate",
        type=int,
        help="RULER, needle: instead of the task's own number; figures then do not compare.",
    )
    add(
        "--model-template",
        default=TASK_TEMPLATE,
        help="Text that the model wants around a prompt, with {task_template} in it; \\n is a newline. Default: none.",
    )
    add("--essays", type=Path, help="RULER: PaulGrahamEssays.json, or a text file. Default: built-in prose.")
    add("--words", type=Path, help="RULER: folder with wonderwords' lists. Default: built-in words.")
    add("--squad", type=Path, help="RULER, qa_1: SQuAD's dev-v2.0.json. Default: built-in questions.")
    add("--hotpotqa", type=Path, help="RULER, qa_2: hotpot_dev_distractor_v1.json. Default: built-in questions.")
    add("--keep-inputs", action="store_true", help="Write prompts into predictions.jsonl, as RULER's scripts do.")
    add("--style", choices=sorted(STYLES), default="0shot", help="LongBench v2: the prompt. Default: 0shot.")
    add("--num-chunks", type=int, default=0, help="LongBench v2 with --style rag: retrieved chunks of an item.")
    add(
        "--max-length",
        type=int,
        help="LongBench v2: tokens of a prompt; longer ones lose their middle. Default: 120000, or what the model has.",
    )
    add("--sampling-temperature", type=float, help="0 is greedy. Default: the benchmark's (RULER 0, LongBench v2 0.1).")
    add_stop_args(group)
    add_overwrite_arg(parser)
    return parser


def config_from_args(args: Namespace) -> EvaluationConfig:
    """The evaluation that the flags ask for; ValueError, in one line, for what makes no sense."""
    asked = BENCHMARKS[args.benchmark]
    config = EvaluationConfig(
        benchmark=args.benchmark,
        output=args.output,
        data=args.data,
        tasks=tuple(args.tasks or asked.TASKS),
        lengths=tuple(sorted(set(args.lengths or getattr(asked, "lengths", (4096,))))),
        num_samples=args.num_samples,
        sample_seed=args.sample_seed,
        tokens_to_generate=args.tokens_to_generate,
        model_template=args.model_template.replace("\\n", "\n"),
        essays=args.essays,
        words=args.words,
        squad=args.squad,
        hotpotqa=args.hotpotqa,
        keep_inputs=args.keep_inputs,
        style=STYLES[args.style],
        num_chunks=args.num_chunks,
        max_length=args.max_length,
        temperature=asked.TEMPERATURE if args.sampling_temperature is None else args.sampling_temperature,
    )
    _check(config)
    return config


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
    if config.model_template.count(TASK_TEMPLATE) != 1:
        raise ValueError(f"--model-template must have {TASK_TEMPLATE} in it once: {config.model_template!r}")
