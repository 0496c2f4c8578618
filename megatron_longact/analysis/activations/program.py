"""Megatron, started to look at checkpoints: one model is built, and each checkpoint is loaded into it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_longact.analysis.activations.megatron import MegatronSource
from megatron_longact.analysis.activations.models import Checkpoint
from megatron_longact.generation.vocabulary import check_tokenizer, embeddings_of
from megatron_longact.megatron.checkpoint_model import load_model, parse_args


def megatron_sources(checkpoints: Sequence[Checkpoint], flags: Sequence[str]) -> Iterator[MegatronSource]:
    """The checkpoints, all of one model, one after the other in the same memory.

    flags: Megatron's, without --load and --ckpt-step. A source is of use until the next one is asked for.
    """
    args = _arguments(checkpoints[0], flags)
    check_tokenizer(args, get_tokenizer())
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = load_model(args, groups)
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
            embeddings=embeddings_of(args),
        )


def _arguments(checkpoint: Checkpoint, flags: Sequence[str]) -> Namespace:
    sys.argv[1:] = [*flags, "--load", str(checkpoint.load)]
    sys.argv += [] if checkpoint.step is None else ["--ckpt-step", str(checkpoint.step)]
    args = parse_args()
    if args.context_parallel_size > 1:
        raise ValueError("this does not work with --context-parallel-size; tensor and pipeline parallelism would")
    return args


def _encode(text: str) -> list[int]:
    return list(get_tokenizer().tokenize(text))
