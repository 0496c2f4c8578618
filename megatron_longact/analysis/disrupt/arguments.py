"""Flags of `tools/disrupt.py` that Megatron does not have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_longact.analysis.disrupt.channels import Channels, Replacement
from megatron_longact.config import LongActConfig, Scope, Statistic, Targets
from megatron_longact.generation.vocabulary import add_stop_args
from megatron_longact.megatron.tool_command import add_overwrite_arg
from megatron_longact.tasks.needle import NEEDLE_TASKS
from megatron_longact.tasks.pieces import TASK_TEMPLATE
from megatron_longact.tasks.ruler import TASKS

FROM_CHECKPOINT = "checkpoint"
_FILES = ("essays", "words", "squad", "hotpotqa")


@dataclass(frozen=True, kw_only=True)
class DisruptConfig:
    """What is replaced by what, and what the model is asked then; `config_from_args` checks it."""

    output: Path
    channels: tuple[Channels, ...]
    replace: tuple[Replacement, ...]
    ratio: float
    scope: Scope
    statistic: Statistic
    targets: Targets
    mask: str
    channel_seed: int
    benchmark: Literal["needle", "ruler"]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_samples: int
    measure_samples: int
    sample_seed: int
    tokens_to_generate: int | None
    model_template: str
    essays: Path | None
    words: Path | None
    squad: Path | None
    hotpotqa: Path | None
    text: Path | None
    text_tokens: int
    text_windows: int
    show: int


def add_disrupt_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    _add_channel_args(parser)
    _add_question_args(parser)
    add_overwrite_arg(parser)
    return parser


def _add_channel_args(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(title="disturbed channels").add_argument
    default = LongActConfig()
    add("--output", type=Path, default=Path("runs/disrupt"), help="Folder for results. Default: runs/disrupt.")
    add("--channels", nargs="+", choices=get_args(Channels), help="Which are replaced. Default: all three, apart.")
    add(
        "--replace",
        nargs="+",
        choices=get_args(Replacement),
        help="By what: the mean over the measured prompts (default), zero, noise of the same mean and deviation.",
    )
    add("--ratio", type=float, default=default.ratio, help="Share of Q, and of K, that is replaced. Default: 0.3.")
    add("--scope", choices=get_args(Scope), default=default.scope, help="Where channels are ranked. Default: layer.")
    add("--statistic", choices=get_args(Statistic), default=default.statistic, help="Of |activation|. mean-abs.")
    add("--targets", choices=get_args(Targets), default=default.targets, help="Replace in Q and K, or one. qk.")
    add(
        "--mask",
        default="",
        metavar="FILE",
        help="Take these channels for the high ones: a file of tools/export_mask.py, or the word checkpoint for "
        "LongAct's own masks in --load. The low and random ones are as many in each layer.",
    )
    add("--channel-seed", type=int, default=0, help="Seed of random channels and of noise. Default: 0.")


def _add_question_args(parser: ArgumentParser) -> None:
    group = parser.add_argument_group(title="what is asked")
    add = group.add_argument
    add("--benchmark", choices=["needle", "ruler"], default="needle", help="Default: needle, the RL program's tasks.")
    add("--tasks", nargs="+", metavar="TASK", help="Of the benchmark. Default: all.")
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help="Context lengths. Default: 64 128 256.")
    add("--num-samples", type=int, default=32, help="Prompts of a task and length. Default: 32.")
    add("--measure-samples", type=int, default=8, help="Other prompts of each, on which channels are measured: 8.")
    add("--sample-seed", type=int, default=42, help="Seed of the prompts. Default: 42.")
    add("--tokens-to-generate", type=int, help="Default: 32 for needles, the task's own number for RULER.")
    add("--model-template", default=TASK_TEMPLATE, help="RULER: text around a prompt, as in tools/evaluate.py.")
    for name in _FILES:
        add(f"--{name}", type=Path, help="RULER: as in tools/evaluate.py.")
    add("--text", type=Path, help="Text for the perplexity. Default: built-in prose.")
    add("--text-tokens", type=int, default=128, help="Tokens of a window of it. Default: 128.")
    add("--text-windows", type=int, default=32, help="Windows, one behind the other; 0: no perplexity. Default: 32.")
    add("--show", type=int, default=2, help="Prompts of each length to show side by side. Default: 2.")
    add_stop_args(group)


def config_from_args(args: Namespace) -> DisruptConfig:
    """What the flags ask for; ValueError, in one line, for what makes no sense."""
    known = NEEDLE_TASKS if args.benchmark == "needle" else TASKS
    given = {name: getattr(args, name) for name in DisruptConfig.__dataclass_fields__}
    config = DisruptConfig(
        **given
        | {
            "channels": tuple(args.channels or get_args(Channels)),
            "replace": tuple(dict.fromkeys(args.replace or ("mean",))),
            "tasks": tuple(dict.fromkeys(args.tasks or known)),
            "lengths": tuple(sorted(set(args.lengths or (64, 128, 256)))),
            "model_template": args.model_template.replace("\\n", "\n"),
        }
    )
    _check(config, known=list(known))
    return config


def _check(config: DisruptConfig, *, known: list[str]) -> None:
    unknown = [task for task in config.tasks if task not in known]
    if unknown:
        raise ValueError(f"--tasks has {unknown[0]!r}; {config.benchmark} has {', '.join(known)}")
    at_least_one = {
        "--num-samples": config.num_samples,
        "--measure-samples": config.measure_samples,
        "--lengths": min(config.lengths),
        "--tokens-to-generate": 1 if config.tokens_to_generate is None else config.tokens_to_generate,
    }
    for flag, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    not_negative = {
        "--text-windows": config.text_windows,
        "--show": config.show,
        "--channel-seed": config.channel_seed,
        "--sample-seed": config.sample_seed,
    }
    for flag, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{flag} is {value}; it must be 0 or more")
    if config.text_tokens < 2:
        raise ValueError(f"--text-tokens is {config.text_tokens}; a window needs at least 2")
    if not 0 < config.ratio < 1:
        raise ValueError(f"--ratio is {config.ratio}; it must be a share between 0 and 1")
    if config.model_template.count(TASK_TEMPLATE) != 1:
        raise ValueError(f"--model-template must have {TASK_TEMPLATE} in it once: {config.model_template!r}")
