"""Flags that say what the RL program trains on and is measured on, and the environment that they make.

Megatron's `--chat-template` takes the template itself; here the name of its file as well.
"""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from megatron_longact.flags import Flag, MegatronFlag, add_groups, config_from_flags
from megatron_longact.generation.vocabulary import StopFlags
from megatron_longact.rl.data.curriculum import Curriculum
from megatron_longact.rl.data.datasets import Dataset
from megatron_longact.rl.data.environment import DatasetEnvironment, Environment, TaskSource
from megatron_longact.rl.data.mixture import Mixture
from megatron_longact.rl.data.prose import ProseConfig
from megatron_longact.rl.data.rewards import REWARDS, find_reward
from megatron_longact.rl.pass_at_k import PassAtK
from megatron_longact.tasks.chat import PromptEncoder, read_chat_template
from megatron_longact.tasks.ruler.tasks import task_named

NEEDLE = "needle"
"""Stands for the needle tasks where a data set may be named."""
RULER = "ruler"
"""Stands for RULER's tasks there: `ruler` for all, `ruler:TASK,TASK` for these."""


def is_made(name: str) -> bool:
    """Whether a name stands for tasks that are made here, at the lengths of the flags, and for no file."""
    return name in (NEEDLE, RULER) or name.startswith(f"{RULER}:")


@dataclass(frozen=True, kw_only=True)
class DataConfig(StopFlags):
    """What the flags say about data; `data_config_from_args` checks them."""

    train_data: Annotated[tuple[str, ...], Flag(metavar="PATH[:WEIGHT]")] = ()
    """JSONL data sets to train on, mixed by weight (default: 1 each). `needle` stands for the needle tasks, which are
    what is trained on without this flag, `ruler` for RULER's, `ruler:TASK,TASK` for some of them."""
    heldout_data: Annotated[tuple[str, ...], Flag(metavar="PATH")] = ()
    """JSONL data sets of the held-out evaluation, or `needle` and `ruler`, which are the default where they are trained
    on. Without any of these nothing is measured."""
    heldout_length_edges: Annotated[tuple[int, ...], Flag(metavar="LENGTH")] = ()
    """Context lengths that held-out prompts are grouped by: the smallest one that the prompt fits in. Default: the
    `length` of the line, else the next power of two."""
    default_reward: Annotated[str | None, Flag(metavar="NAME")] = None
    """Reward of the lines that name none."""
    correct_reward: float = 1.0
    """Least reward with which a response counts as right in the accuracy and in pass@k."""
    drop_overlong_prompts: bool = False
    """Leave prompts out that do not fit, and say how many, instead of refusing the data set."""
    curriculum: Annotated[Curriculum, Flag(nargs="+", metavar="STEP:LENGTH", parse=Curriculum.parse)] = field(
        default_factory=Curriculum
    )
    """Longest prompt, in tokens, that training draws from a rollout step on: STEP:LENGTH pairs from step 0 on, such as
    0:4096 100:8192. Default: any length."""
    chat_template: Annotated[str | None, MegatronFlag(parse=read_chat_template)] = None
    """What turns the messages of a prompt into text: a template, or the name of its file."""
    pass_at: PassAtK = field(default_factory=PassAtK)
    prose: ProseConfig = field(default_factory=ProseConfig)

    @property
    def train(self) -> tuple[tuple[str, float], ...]:
        """Paths, or `needle`, with weights; none: the needle tasks alone."""
        return tuple(_weighted(item) for item in self.train_data)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of how the flags were read, a line each."""
        return tuple(_ambiguities(self.train_data, self.heldout_data))

    @property
    def made_to_train(self) -> tuple[str, ...]:
        """What is trained on of what is made here: `needle`, `ruler:...`."""
        return tuple(name for name, _ in self.train if is_made(name)) if self.train_data else (NEEDLE,)

    @property
    def made(self) -> tuple[str, ...]:
        """What is trained or measured on of it."""
        return (*self.made_to_train, *(name for name in self.heldout_data if is_made(name)))


DATA_GROUPS = {"rl data": DataConfig, "rl evaluation": PassAtK, "rl prose": ProseConfig}


def add_data_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags; returns the parser."""
    return add_groups(parser, DATA_GROUPS)


def data_config_from_args(args: Namespace) -> DataConfig:
    """What the flags say; reads no data set yet. Raises ValueError, in one line, for what cannot be."""
    config: DataConfig = config_from_flags(DataConfig, args)
    _check_data_sets(config)
    _check_numbers(config)
    if config.default_reward is not None and config.default_reward not in REWARDS:
        find_reward(config.default_reward)
    return config


def build_environment(
    data: DataConfig,
    tokenizer: Any,
    *,
    needles: Callable[[Curriculum], TaskSource],
    ruler: Callable[[PromptEncoder, Sequence[str], Curriculum], TaskSource],
    max_prompt_length: int,
    prompts_per_step: int,
    seed: int,
    say: Callable[[str], None],
) -> Environment:
    """The environment of a run, every data set read and checked.

    tokenizer: Megatron's; needles, ruler: make the needle tasks, and those of RULER with these names, under a
    curriculum, called only where they are used; max_prompt_length: tokens that fit beside a response; say: is given one
    line for each data set. Without data flags it is the needle environment and nothing else. Raises ValueError as
    `Dataset`, `Curriculum` and the parts do.
    """
    for remark in data.remarks:
        say(remark)
    if not data.train_data and not data.heldout_data:
        return needles(data.curriculum)
    encoder = PromptEncoder(tokenizer, chat_template=data.chat_template)

    def source(name: str, curriculum: Curriculum) -> TaskSource:
        if name == NEEDLE:
            return needles(curriculum)
        if is_made(name):
            return ruler(encoder, _ruler_names(name), curriculum)
        dataset = Dataset(
            name,
            encoder,
            max_prompt_length=max_prompt_length,
            drop_overlong=data.drop_overlong_prompts,
            default_reward=data.default_reward,
        )
        say(dataset.summary)
        return DatasetEnvironment(
            dataset,
            seed=seed,
            curriculum=curriculum,
            length_edges=data.heldout_length_edges,
            correct_reward=data.correct_reward,
        )

    training = data.train or ((NEEDLE, 1.0),)
    heldout = data.heldout_data or data.made_to_train
    return Mixture(
        [(source(name, data.curriculum), weight) for name, weight in training],
        heldout=[source(name, Curriculum()) for name in heldout],
        tasks_per_step=prompts_per_step,
    )


def _ruler_names(name: str) -> tuple[str, ...]:
    """The tasks of `ruler:TASK,TASK`; none stands for all."""
    return tuple(filter(None, name.removeprefix(RULER).removeprefix(":").split(",")))


def _weighted(item: str) -> tuple[str, float]:
    """`PATH[:WEIGHT]`: a name that exists is a path as it stands; else a number behind the last colon is a weight."""
    path, colon, weight = item.rpartition(":")
    if not colon or os.path.exists(item):
        return item, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return item, 1.0


def _ambiguities(train: Sequence[str], heldout: Sequence[str]) -> Iterator[str]:
    """What was done about names that could have meant something else, a line each."""
    for item in train:
        path, _, weight = item.rpartition(":")
        if re.fullmatch(r"[\d.]+", weight) and os.path.exists(item) and (is_made(path) or os.path.exists(path)):
            yield f"--train-data {item} is the file of this name; {path} with this weight would be {path}:+{weight}"
    names = {_weighted(item)[0] for item in train} | set(heldout)
    for name in sorted(names):
        if is_made(name) and os.path.exists(name):
            whose = "the needle tasks" if name == NEEDLE else "tasks of RULER's"
            yield f"{name} stands for {whose}; the file of this name would be ./{name}"


def _check_data_sets(config: DataConfig) -> None:
    for flag, names in (("--train-data", [name for name, _ in config.train]), ("--heldout-data", config.heldout_data)):
        for name in names:
            for task in _ruler_names(name) if is_made(name) and name != NEEDLE else ():
                task_named(task)
            if not is_made(name) and not Path(name).is_file():
                raise ValueError(
                    f"{flag} {name}: no such file (give PATH, or for training PATH:WEIGHT, `needle`, `ruler`, or "
                    "`ruler:TASK,TASK`)"
                )
        _check_distinct(names, flag=flag)
    for name, weight in config.train:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"--train-data {name}: the weight is {weight}; it must be positive and finite")
    trained = {Path(name).resolve() for name, _ in config.train if not is_made(name)}
    for name in config.heldout_data:
        if Path(name).resolve() in trained:
            raise ValueError(f"--heldout-data {name} is in --train-data as well; hold out what is not trained on")


def _check_distinct(names: Sequence[str], *, flag: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{flag} names {name} more than once; give it once, with a larger weight")


def _check_numbers(config: DataConfig) -> None:
    edges = config.heldout_length_edges
    if any(edge < 1 for edge in edges) or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"--heldout-length-edges are {edges}; they must be positive and increase")
    if not math.isfinite(config.correct_reward):
        raise ValueError(f"--correct-reward is {config.correct_reward}; it must be a finite number")
