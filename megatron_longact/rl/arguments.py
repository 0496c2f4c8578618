"""Flags of the RL program, and what Megatron's own flags must fulfil for it.

Each is a field of `RLConfig` or of a dataclass in it. Whatever Megatron has a flag for keeps that flag; besides those
of the fields `--eval-interval`, `--inference-max-requests` (responses made at once by the static engine) and
`--inference-dynamic-batching` (the dynamic engine, with its own flags). Megatron checks its RL flags only with
`--perform-rl-step`, which belongs to its own loop, so they are checked here.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

import torch

from megatron_longact.conversion.model_files import NEEDS_TOKENIZER
from megatron_longact.flags import add_groups, config_from_flags
from megatron_longact.generation.engine import replicas_share_experts
from megatron_longact.rl.config import AnswerFlags, RLConfig
from megatron_longact.rl.data.arguments import DATA_GROUPS, NEEDLE, data_config_from_args
from megatron_longact.rl.defaults import set_defaults, settle_defaults
from megatron_longact.rl.exports import check_exports
from megatron_longact.rl.objectives.advantages import overlong_penalty
from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig
from megatron_longact.rl.sharing import settle_sharing

GROUPS = {"rl program": RLConfig, "rl objective": PolicyLossConfig, **DATA_GROUPS, "rl answers": AnswerFlags}


def add_rl_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags that Megatron does not have, and set the defaults of those that it has; returns the parser."""
    set_defaults(parser)
    parser.set_defaults(**{NEEDS_TOKENIZER: True})
    return add_groups(parser, GROUPS)


def rl_config_from_args(args: Namespace) -> RLConfig:
    """The run that the flags ask for.

    Raises ValueError, in one line, for a value that makes no sense, for what the rollout engine
    cannot do, and for Megatron's RL flags that would have no effect here.
    """
    _refuse_unsupported(args)
    settle_defaults(args, sys.argv[1:])
    _check_schedule(args)
    shared = settle_sharing(args)
    config: RLConfig = config_from_flags(RLConfig, args, data=data_config_from_args(args), shared_prompts=shared)
    _check_lengths(config, max_position_embeddings=args.max_position_embeddings)
    _check_parts(args, config)
    _check_batches(config)
    _check_interleaved(args, config)
    _check_objective(config)
    check_exports(args)
    return config


def _check_schedule(args: Namespace) -> None:
    """Megatron asserts it, without a word on what was given."""
    names = ("lr_decay_iters", "train_iters", "lr_warmup_iters")
    decay, iterations, warmup = (getattr(args, name, None) for name in names)
    last = decay or iterations
    if warmup and last and warmup >= last:
        raise ValueError(
            f"--lr-warmup-iters is {warmup}, and the learning rate's schedule ends at iteration {last} "
            "(--lr-decay-iters, else --train-iters): give a shorter warm-up"
        )


def _check_lengths(config: RLConfig, *, max_position_embeddings: int) -> None:
    if config.seq_length > max_position_embeddings:
        raise ValueError(
            f"--seq-length is {config.seq_length}, longer than the model's "
            f"--max-position-embeddings {max_position_embeddings}"
        )
    response = config.sampling.max_response_length  # raises for what cannot be drawn
    if config.longest_prompt < 1:
        raise ValueError(
            f"--max-response-length {response} leaves no room for a prompt in --seq-length {config.seq_length}"
        )
    if config.data.prose.windows and config.data.prose.tokens > max_position_embeddings:
        raise ValueError(
            f"--eval-prose-tokens is {config.data.prose.tokens}, but the model has {max_position_embeddings} positions"
        )
    if config.data.made:
        _check_made_lengths(config, max_position_embeddings=max_position_embeddings)


def parts_of_rows(args: Namespace) -> int:
    """How many equal parts sequence and context parallelism cut rows into; the latter gives each rank two."""
    parts = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return int(parts if args.context_parallel_size == 1 else 2 * args.context_parallel_size * parts)


def _check_parts(args: Namespace, config: RLConfig) -> None:
    parts = parts_of_rows(args)
    if args.seq_length % parts:
        raise ValueError(
            f"--seq-length is {args.seq_length}; sequence and context parallelism cut rows into {parts} equal parts: "
            f"choose a multiple of {parts}"
        )
    splits_packed_rows = args.context_parallel_size > 1 and config.pack_sequences and not config.shared_prompts
    if splits_packed_rows and not {"p2p", "a2a"}.issuperset(args.cp_comm_type):
        raise ValueError(
            f"--cp-comm-type is {' '.join(args.cp_comm_type)}; for packed rows Transformer Engine has p2p and a2a alone"
        )


def _check_made_lengths(config: RLConfig, *, max_position_embeddings: int) -> None:
    lengths = config.context_lengths + config.heldout_context_lengths
    if not lengths or (config.data.made_to_train and not config.context_lengths):
        raise ValueError(
            f"{'the needle tasks' if NEEDLE in config.data.made else config.data.made[0]} need --context-lengths, the "
            "lengths of their prompts in tokens"
        )
    if min(lengths) < 1:
        raise ValueError(f"a context length is {min(lengths)}; it must be at least 1")
    if NEEDLE not in config.data.made:  # RULER's lengths are with the response
        if max(lengths) > config.seq_length:
            raise ValueError(f"a context of {max(lengths)} tokens does not fit into --seq-length {config.seq_length}")
        return
    needed = max(lengths) + config.max_response_length
    if needed > config.seq_length:
        raise ValueError(
            f"a context of {max(lengths)} tokens plus a response of "
            f"{config.max_response_length} needs {needed} positions, but --seq-length is "
            f"{config.seq_length} (the model has {max_position_embeddings} positions)"
        )


def _check_batches(config: RLConfig) -> None:
    counts = {
        "--grpo-prompts-per-step": config.prompts_per_step,
        "--grpo-iterations": config.epochs,
        "--rl-prompts-per-eval": config.heldout_prompts,
    }
    for flag, count in counts.items():
        if count < 1:
            raise ValueError(f"{flag} is {count}; it must be at least 1")
    if config.group_size < 2:
        raise ValueError(
            f"--grpo-group-size is {config.group_size}; advantages are relative to a group, so it must be at least 2"
        )
    if config.responses_per_step % config.global_batch_size:
        raise ValueError(
            f"--grpo-prompts-per-step {config.prompts_per_step} x --grpo-group-size "
            f"{config.group_size} = {config.responses_per_step} responses do not divide into "
            f"optimizer steps of --global-batch-size {config.global_batch_size}"
        )
    if config.kl_beta < 0:
        raise ValueError(f"--grpo-kl-beta is {config.kl_beta}; it must not be negative")


def _check_interleaved(args: Namespace, config: RLConfig) -> None:
    """Megatron's interleaved schedule takes as many micro-batches at once as there are stages."""
    if args.virtual_pipeline_model_parallel_size is None:
        return
    packed = config.pack_sequences or config.shared_prompts
    rows = 1 if packed else config.micro_batch_size
    unit = rows * args.data_parallel_size * args.pipeline_model_parallel_size
    if config.global_batch_size % unit:  # packed ones too: each response may fill a row
        raise ValueError(
            f"--global-batch-size is {config.global_batch_size}; --num-layers-per-virtual-pipeline-stage wants "
            f"a multiple of {unit}: {rows} responses a micro-batch x "
            f"{args.data_parallel_size} replicas x {args.pipeline_model_parallel_size} micro-batches at once"
        )


def _check_objective(config: RLConfig) -> None:
    if config.overlong_buffer_length:  # raises for a buffer that does not fit
        overlong_penalty(
            torch.zeros(1),
            max_response_length=config.max_response_length,
            buffer_length=config.overlong_buffer_length,
            penalty_factor=config.overlong_penalty_factor,
        )
    if not config.importance_threshold > 0:
        raise ValueError(
            f"--rl-importance-sampling-truncation-coef is {config.importance_threshold}; it must be positive"
        )
    counts = {
        "--max-sampling-rounds": config.sampling_rounds,
        "--logits-chunk-size": config.logits_chunk_size,
        "--rl-sequence-packing-max-sequences-per-bin": config.max_sequences_per_row,
    }
    for flag, count in counts.items():
        if count < 1:
            raise ValueError(f"{flag} is {count}; it must be at least 1")


def _refuse_unsupported(args: Namespace) -> None:
    static = not args.inference_dynamic_batching
    refused = {
        "--perform-rl-step": (args.perform_rl_step, "it switches on Megatron's own RL loop"),
        "--cuda-graph-impl local": (
            args.cuda_graph_impl == "local" and static,
            "without --inference-dynamic-batching it captures training forwards, whose replay runs no hook",
        ),
        "--num-layers-per-virtual-pipeline-stage and --inference-dynamic-batching": (
            args.virtual_pipeline_model_parallel_size is not None and not static,
            "the dynamic inference engine knows one chunk of the model a rank; leave --inference-dynamic-batching out: "
            "the static engine knows them all",
        ),
        "--expert-model-parallel-size and --inference-dynamic-batching": (
            not static and replicas_share_experts(args),
            "a replica that has finished would leave the others waiting for its experts; leave "
            "--inference-dynamic-batching out: with the static engine those that share experts generate together",
        ),
        "--calculate-per-token-loss": (
            args.calculate_per_token_loss,
            "--loss-aggregation says how tokens are averaged",
        ),
        "--hybrid-context-parallel": (
            args.hybrid_context_parallel,
            "each sequence then lies on another number of ranks; --context-parallel-size alone works",
        ),
        "--mtp-num-layers": (
            bool(args.mtp_num_layers),
            "layers that predict further tokens learn to imitate the responses, whatever their reward, and change the "
            "model with it; start from a checkpoint without them",
        ),
        "--rampup-batch-size": (args.rampup_batch_size is not None, "rollout batches are fixed"),
        "--grpo-entropy-term-weight": (args.grpo_entropy_term_weight != 0, "not implemented"),
        "--fp8-recipe delayed": (
            args.fp8 is not None and args.fp8_recipe == "delayed",
            "the rollouts after its first step ended in an assertion on the device (H100, Transformer Engine 2.11); "
            "choose tensorwise, blockwise or mxfp8, whose scales are those of the tensor at hand",
        ),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ValueError(f"the RL program does not work with {flag}: {reason}")
