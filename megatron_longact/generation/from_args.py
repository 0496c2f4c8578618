"""Which of the two engines makes the responses."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_tokenizer
from torch import nn

from megatron_longact.generation.dynamic import DynamicRolloutEngine, check_step, inference_config_from_args
from megatron_longact.generation.engine import RolloutEngine
from megatron_longact.generation.static import StaticRolloutEngine
from megatron_longact.generation.vocabulary import vocabulary_from_args


def check_longest(args: Namespace, longest: int) -> None:
    """Raise `ValueError` if a prompt is to come that the engine of the flags cannot take; before any is made."""
    if args.inference_dynamic_batching:
        max_tokens = args.inference_dynamic_batching_max_tokens
        check_step(longest, max_tokens=max_tokens, chunked=args.enable_chunked_prefill)


def rollout_engine(
    args: Namespace, model: Sequence[nn.Module], pgs: ProcessGroupCollection, *, longest: int | None = None
) -> RolloutEngine:
    """Megatron's dynamic engine with `--inference-dynamic-batching`, else its static one.

    Ranks that share sequences in training, by context parallelism, are replicas here. args: Megatron's; model: its
    chunks on this rank, of which the dynamic engine takes one. What can be drawn, and what ends a response:
    `vocabulary_from_args`.
    """
    vocabulary, (unwrapped, *later) = vocabulary_from_args(args, get_tokenizer()), unwrap_model(list(model))
    if args.inference_dynamic_batching:
        return DynamicRolloutEngine(
            unwrapped,
            config=inference_config_from_args(args, unwrapped, longest=longest),
            eod=vocabulary.eod,
            stop_ids=vocabulary.stop_ids[1:],
            vocab_size=vocabulary.size,
            dp_group=pgs.dp_cp,
            mp_group=pgs.mp,
        )
    return StaticRolloutEngine(
        unwrapped,
        eod=vocabulary.eod,
        stop_ids=vocabulary.stop_ids[1:],
        vocab_size=vocabulary.size,
        max_batch_size=args.inference_max_requests,
        dp_group=pgs.dp_cp,
        expert_group=pgs.tp_ep,
        later_chunks=later,
    )
