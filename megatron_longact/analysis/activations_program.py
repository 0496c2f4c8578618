"""Megatron, started to look at checkpoints: one model is built, and each checkpoint is loaded into it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_longact.analysis.activations import folder_name
from megatron_longact.analysis.activations_megatron import MegatronSource
from megatron_longact.conversion.megatron_args import completing, with_rope_scaling_factor

_FLAGS = ["--skip-train", "--no-load-optim", "--no-load-rng", "--micro-batch-size=1", "--seq-length=64"]
"""What Megatron asks every program for, or would otherwise load."""

Checkpoint = tuple[Path, int | None]


def megatron_sources(checkpoints: Sequence[Checkpoint], flags: Sequence[str]) -> Iterator[MegatronSource]:
    """The checkpoints, all of one model, one after the other in the same memory.

    flags: Megatron's, without --load and --ckpt-step. A source is of use until the next one is asked for.
    """
    steps = [_iteration(*checkpoint) for checkpoint in checkpoints]
    args = _arguments(checkpoints[0], flags)
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, with_rope_scaling_factor(gpt_config_from_args)(args)),
        pg_collection=groups,
    )
    for i, (load, step) in enumerate(checkpoints):
        if i:
            args.load, args.ckpt_step = str(load), step
            checkpointing.load_checkpoint(model, None, None)
        yield MegatronSource(
            name=f"{_short(load)} {steps[i]}",
            chunks=model,
            encode=_encode,
            positions=int(args.max_position_embeddings),
            dp_group=groups.dp,
        )


def _arguments(checkpoint: Checkpoint, flags: Sequence[str]) -> Namespace:
    load, step = checkpoint
    given = {argument.split("=", 1)[0] for argument in flags}
    sys.argv[1:] = [*flags, *(flag for flag in _FLAGS if flag.split("=", 1)[0] not in given), "--load", str(load)]
    sys.argv += [] if step is None else ["--ckpt-step", str(step)]
    original = checkpointing.load_args_from_checkpoint
    checkpointing.load_args_from_checkpoint = completing(original)
    try:
        args = parse_and_validate_args()
    finally:
        checkpointing.load_args_from_checkpoint = original
    if args.context_parallel_size > 1:
        raise ValueError("this does not work with --context-parallel-size; tensor and pipeline parallelism would")
    return args


def _iteration(load: Path, step: int | None) -> str:
    """How the iteration of a checkpoint is called; `ValueError` where there is none."""
    try:
        latest = (load / "latest_checkpointed_iteration.txt").read_text().strip()
    except OSError as error:
        raise ValueError(f"--load {load} holds no Megatron checkpoint: {error.strerror}") from error
    name = latest if step is None else str(step)
    if name.isdecimal() and not (load / f"iter_{int(name):07d}").is_dir():
        there = sorted(int(path.name[5:]) for path in load.glob("iter_*"))
        raise ValueError(f"--load {load} has no iteration {name}, it has {', '.join(map(str, there))}")
    return name


def _short(load: Path) -> str:
    """A folder's name; its parent's if it is called "checkpoints"."""
    return folder_name(load.resolve().parent if load.name == "checkpoints" else load)


def _encode(text: str) -> list[int]:
    return list(get_tokenizer().tokenize(text))
