"""Flags of `longact disrupt` that Megatron does not have."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from megatron_longact.analysis.disrupt.channels import Channels, Replacement
from megatron_longact.config import LongActConfig, Scope, Statistic, Targets
from megatron_longact.flags import Flag, add_groups, ascending, config_from_flags, each_once
from megatron_longact.generation.vocabulary import StopFlags
from megatron_longact.megatron.tool_command import add_overwrite_arg
from megatron_longact.tasks.needle import NEEDLE_TASKS
from megatron_longact.tasks.prompt_flags import PromptFlags
from megatron_longact.tasks.ruler import TASKS

FROM_CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class DisruptConfig(PromptFlags, StopFlags):
    """What is replaced by what, and what the model is asked then; `config_from_args` checks it."""

    output: Path = Path("runs/disrupt")
    """Folder for results."""
    html: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Everything on one page, too, that can be sent."""
    channels: tuple[Channels, ...] = get_args(Channels)
    """Which are replaced, one set after the other."""
    replace: Annotated[tuple[Replacement, ...], Flag(parse=each_once)] = ("mean",)
    """By what: the mean over the measured prompts, zero, noise of the same mean and deviation."""
    ratio: Annotated[tuple[float, ...], Flag(metavar="SHARE", parse=ascending)] = (LongActConfig.ratio,)
    """Shares of Q, and of K, that are replaced, one after the other."""
    scope: Scope = LongActConfig.scope
    """Where channels are ranked."""
    statistic: Statistic = LongActConfig.statistic
    """Statistic of a channel's activation over tokens, by which they are ranked."""
    targets: Targets = LongActConfig.targets
    """Replace in Q and K, or in one of them."""
    mask: Annotated[str, Flag(metavar="FILE")] = ""
    """Take these channels for the high ones: a file of `longact export-mask`, or the word checkpoint for LongAct's own
    masks in --load. The low and random ones are as many in each layer."""
    channel_seed: int = 0
    """Seed of random channels and of noise."""
    benchmark: Literal["needle", "ruler"] = "needle"
    """What the model is asked; needle: the RL program's tasks."""
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK", needed=False)]
    """Of the benchmark. Default: all."""
    lengths: Annotated[tuple[int, ...], Flag(metavar="TOKENS", parse=ascending)] = (64, 128, 256)
    """Context lengths."""
    num_samples: int = 32
    """Prompts of a task and length."""
    measure_samples: int = 8
    """Other prompts of each, on which channels are measured."""
    sample_seed: int = 42
    """Seed of the prompts."""
    tokens_to_generate: int | None = None
    """Tokens of a response. Default: 32 for needles, the task's own number for RULER."""
    text: Path | None = None
    """Text for the perplexity. Default: built-in prose."""
    text_tokens: int = 128
    """Tokens of a window of it."""
    text_windows: int = 32
    """Windows, one behind the other; 0: no perplexity."""
    show: int = 2
    """Prompts of each length to show side by side."""


def add_disrupt_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    add_overwrite_arg(parser)
    return add_groups(parser, {"disruption": DisruptConfig})


def config_from_args(args: Namespace) -> DisruptConfig:
    """What the flags ask for; ValueError, in one line, for what makes no sense."""
    known = NEEDLE_TASKS if args.benchmark == "needle" else TASKS
    config: DisruptConfig = config_from_flags(DisruptConfig, args, tasks=each_once(args.tasks or known))
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
    for ratio in config.ratio:
        if not 0 < ratio < 1:
            raise ValueError(f"--ratio is {ratio}; it must be a share between 0 and 1")
    if config.mask and len(config.ratio) > 1:
        raise ValueError("--mask has the share of its channels; give no --ratio")
