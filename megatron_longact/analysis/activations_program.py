"""Megatron, started to look at checkpoints: one model is built, and each checkpoint is loaded into it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_longact.analysis.activations_megatron import MegatronSource
from megatron_longact.analysis.activations_models import Checkpoint
from megatron_longact.conversion.megatron_args import completing, with_rope_scaling_factor

_FLAGS = ["--skip-train", "--no-load-optim", "--no-load-rng", "--micro-batch-size=1", "--seq-length=64"]
"""What Megatron asks every program for, or would otherwise load."""


def megatron_sources(checkpoints: Sequence[Checkpoint], flags: Sequence[str]) -> Iterator[MegatronSource]:
    """The checkpoints, all of one model, one after the other in the same memory.

    flags: Megatron's, without --load and --ckpt-step. A source is of use until the next one is asked for.
    """
    args = _arguments(checkpoints[0], flags)
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, with_rope_scaling_factor(gpt_config_from_args)(args)),
        pg_collection=groups,
    )
    for i, checkpoint in enumerate(checkpoints):
        if i:
            args.load, args.ckpt_step = str(checkpoint.load), checkpoint.step
            checkpointing.load_checkpoint(model, None, None)
        yield MegatronSource(
            name=checkpoint.name,
            chunks=model,
            encode=_encode,
            positions=int(args.max_position_embeddings),
            dp_group=groups.dp,
        )


def _arguments(checkpoint: Checkpoint, flags: Sequence[str]) -> Namespace:
    given = {argument.split("=", 1)[0] for argument in flags}
    sys.argv[1:] = [
        *flags,
        *(flag for flag in _FLAGS if flag.split("=", 1)[0] not in given),
        "--load",
        str(checkpoint.load),
    ]
    sys.argv += [] if checkpoint.step is None else ["--ckpt-step", str(checkpoint.step)]
    original = checkpointing.load_args_from_checkpoint
    checkpointing.load_args_from_checkpoint = completing(original)
    try:
        args = parse_and_validate_args()
    finally:
        checkpointing.load_args_from_checkpoint = original
    if args.context_parallel_size > 1:
        raise ValueError("this does not work with --context-parallel-size; tensor and pipeline parallelism would")
    return args


def _encode(text: str) -> list[int]:
    return list(get_tokenizer().tokenize(text))
