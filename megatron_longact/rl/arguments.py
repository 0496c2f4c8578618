"""Flags of the RL program, and what Megatron's own flags must fulfil for it.

Whatever Megatron has a flag for keeps that flag: `--grpo-prompts-per-step`, `--grpo-group-size`,
`--grpo-iterations`, `--grpo-clamp-eps-lower/upper`, `--grpo-kl-beta`, `--rl-default-temperature`,
`--rl-default-top-p`, `--rl-default-top-k`, `--rl-prompts-per-eval` (here: for each context length),
`--grpo-filter-groups-with-same-reward` (DAPO's dynamic sampling),
`--rl-inference-logprobs-is-correction`, `--rl-importance-sampling-truncation-coef`,
`--rl-use-sequence-packing` (rows of at most `--seq-length` tokens),
`--rl-sequence-packing-max-sequences-per-bin`,
`--eval-interval`, `--inference-max-requests` (responses made at once by the static engine),
`--inference-dynamic-batching` (the dynamic engine, with its own flags), `--global-batch-size`
(responses an optimizer step), `--seq-length` (longest prompt plus response). Megatron checks its RL
flags only with `--perform-rl-step`, which belongs to its own loop, so they are checked here.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import get_args

import torch

from megatron_longact.generation.sampling import Sampling
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.data.arguments import add_data_args, data_config_from_args
from megatron_longact.rl.defaults import LONGEST_DEFAULT_RESPONSE, NEEDLE_RESPONSE, set_defaults, settle_defaults
from megatron_longact.rl.objectives.aggregation import Aggregation
from megatron_longact.rl.objectives.importance_weights import Level
from megatron_longact.rl.objectives.kl import KLKind
from megatron_longact.rl.objectives.overlong import overlong_penalty
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES, PolicyLossConfig


def add_rl_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags that Megatron does not have, and set the defaults of those that it has; returns the parser."""
    set_defaults(parser)
    group = parser.add_argument_group(title="rl program")
    add = group.add_argument
    add(
        "--run-dir",
        required=True,
        help="Folder for metrics.jsonl, evaluations.jsonl, the report and Megatron's own output.",
    )
    add("--needle-tasks", nargs="+", help="Needle tasks to train and evaluate on. Default: all.")
    add(
        "--context-lengths",
        nargs="+",
        type=int,
        default=[],
        help="Prompt lengths of the needle tasks in tokens, drawn with equal chance.",
    )
    add(
        "--heldout-context-lengths",
        nargs="+",
        type=int,
        help="Prompt lengths of the held-out needle tasks. Default: those of training.",
    )
    add(
        "--overwrite",
        action="store_true",
        help="Start anew: remove what an earlier run left in --run-dir, and the checkpoints in --save.",
    )
    add(
        "--max-response-length",
        type=int,
        help=f"Tokens of a response at most, the end-of-text token included. Default: {NEEDLE_RESPONSE} for the needle "
        f"tasks alone; with data sets a quarter of --seq-length, at most {LONGEST_DEFAULT_RESPONSE}.",
    )
    add(
        "--kl-estimator",
        default="k3",
        choices=get_args(KLKind),
        help="Estimator of the KL penalty (--grpo-kl-beta). Default: k3.",
    )
    add(
        "--no-advantage-std",
        action="store_true",
        help="Do not divide advantages by their group's standard deviation (Dr. GRPO).",
    )
    add(
        "--offload-reference",
        action="store_true",
        help="Keep the reference weights of the KL penalty on the host.",
    )
    add(
        "--logits-chunk-size",
        type=int,
        default=RLConfig.logits_chunk_size,
        help="Tokens whose logits are in memory at once; what is beyond is made again in the backward. Default: 1024.",
    )
    add("--expected-gain", type=float, help="Points of held-out accuracy; the report says so if a run gains less.")
    add(
        "--save-first-iteration",
        action="store_true",
        help="Save a checkpoint after the first iteration as well, beside Megatron's --save-interval.",
    )
    _add_objective_args(parser)
    _add_sampling_args(parser)
    return add_data_args(parser)


def _add_objective_args(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(title="rl objective").add_argument
    add("--policy-loss", default="grpo", choices=sorted(POLICY_LOSSES), help="The objective. Default: grpo.")
    add(
        "--loss-aggregation",
        default="token-mean",
        choices=get_args(Aggregation),
        help="How token losses become one number. Default: token-mean.",
    )
    add("--dual-clip", type=float, help="Bound of the loss at negative advantages. Default: off.")
    default = PolicyLossConfig()
    add(
        "--kl-cov-ratio",
        type=float,
        default=default.kl_cov_ratio,
        help="kl-cov: share of the step's tokens, those of largest covariance, that get a KL penalty. Default: 0.0002.",
    )
    add("--kl-cov-coef", type=float, default=default.kl_cov_coef, help="kl-cov: weight of that penalty. Default: 1.")
    add(
        "--clip-cov-ratio",
        type=float,
        default=default.clip_cov_ratio,
        help="clip-cov: share of the step's tokens that are left out. Default: 0.0002.",
    )
    add(
        "--clip-cov-lower",
        type=float,
        default=default.clip_cov_lower,
        help="clip-cov: only tokens of a covariance above this are left out. Default: 1.",
    )
    add(
        "--clip-cov-upper",
        type=float,
        default=default.clip_cov_upper,
        help="clip-cov: only tokens of a covariance below this are left out. Default: 5.",
    )


def _add_sampling_args(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(title="rl sampling").add_argument
    add(
        "--max-sampling-rounds",
        type=int,
        default=10,
        help="With --grpo-filter-groups-with-same-reward: rounds of --grpo-prompts-per-step prompts that are sampled "
        "at most to fill a batch. Default: 10.",
    )
    add(
        "--overlong-buffer-length",
        type=int,
        default=RLConfig.overlong_buffer_length,
        help="Tokens before --max-response-length over which a response's reward falls (DAPO's soft overlong "
        "punishment). Default: 0, no punishment.",
    )
    add(
        "--overlong-penalty-factor",
        type=float,
        default=RLConfig.overlong_penalty_factor,
        help="What a response of full length loses. Default: 1.",
    )
    add(
        "--importance-sampling-level",
        default="token",
        choices=get_args(Level),
        help="With --rl-inference-logprobs-is-correction: whether tokens are weighted or whole responses. "
        "Default: token.",
    )


def rl_config_from_args(args: Namespace) -> RLConfig:
    """The run that the flags ask for.

    Raises ValueError, in one line, for a value that makes no sense, for what the rollout engine
    cannot do, and for Megatron's RL flags that would have no effect here.
    """
    _refuse_unsupported(args)
    settle_defaults(args, sys.argv[1:])
    _check_schedule(args)
    context_lengths = tuple(args.context_lengths)
    config = RLConfig(
        prompts_per_step=args.grpo_prompts_per_step,
        group_size=args.grpo_group_size,
        epochs=args.grpo_iterations,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        sampling=Sampling(
            max_response_length=args.max_response_length,
            temperature=args.rl_default_temperature,
            top_p=args.rl_default_top_p,
            top_k=args.rl_default_top_k,
            seed=args.seed,
        ),
        policy_loss=args.policy_loss,
        loss=PolicyLossConfig(
            clip_low=args.grpo_clamp_eps_lower,
            clip_high=args.grpo_clamp_eps_upper,
            dual_clip=args.dual_clip,
            kl_cov_ratio=args.kl_cov_ratio,
            kl_cov_coef=args.kl_cov_coef,
            clip_cov_ratio=args.clip_cov_ratio,
            clip_cov_lower=args.clip_cov_lower,
            clip_cov_upper=args.clip_cov_upper,
            aggregation=args.loss_aggregation,
        ),
        kl_beta=args.grpo_kl_beta,
        kl_estimator=args.kl_estimator,
        normalize_advantages=not args.no_advantage_std,
        dynamic_sampling=args.grpo_filter_groups_with_same_reward,
        max_sampling_rounds=args.max_sampling_rounds if args.grpo_filter_groups_with_same_reward else 1,
        overlong_buffer_length=args.overlong_buffer_length,
        overlong_penalty_factor=args.overlong_penalty_factor,
        importance_level=args.importance_sampling_level if args.rl_inference_logprobs_is_correction else None,
        importance_threshold=_truncation(args),
        offload_reference=args.offload_reference,
        logits_chunk_size=args.logits_chunk_size,
        pack_sequences=args.rl_use_sequence_packing,
        max_sequences_per_row=args.rl_sequence_packing_max_sequences_per_bin,
        data=data_config_from_args(args),
        tasks=tuple(args.needle_tasks or ()),
        context_lengths=context_lengths,
        heldout_context_lengths=tuple(args.heldout_context_lengths or context_lengths),
        heldout_prompts=args.rl_prompts_per_eval,
        seed=args.seed,
        expected_gain=args.expected_gain,
    )
    _check_lengths(config, max_position_embeddings=args.max_position_embeddings)
    _check_batches(config)
    _check_objective(config)
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


def _truncation(args: Namespace) -> float:
    """The bound of importance weights: Megatron's flag, which is off by default."""
    given = args.rl_importance_sampling_truncation_coef
    return RLConfig.importance_threshold if given is None else float(given)


def _check_lengths(config: RLConfig, *, max_position_embeddings: int) -> None:
    if config.seq_length > max_position_embeddings:
        raise ValueError(
            f"--seq-length is {config.seq_length}, longer than the model's "
            f"--max-position-embeddings {max_position_embeddings}"
        )
    response = config.sampling.max_response_length
    if config.longest_prompt < 1:
        raise ValueError(
            f"--max-response-length {response} leaves no room for a prompt in --seq-length {config.seq_length}"
        )
    if config.data.uses_needles:
        _check_needle_lengths(config, max_position_embeddings=max_position_embeddings)


def _check_needle_lengths(config: RLConfig, *, max_position_embeddings: int) -> None:
    lengths = config.context_lengths + config.heldout_context_lengths
    if not lengths or (config.data.trains_on_needles and not config.context_lengths):
        raise ValueError("the needle tasks need --context-lengths, the lengths of their prompts in tokens")
    if min(lengths) < 1:
        raise ValueError(f"a context length is {min(lengths)}; it must be at least 1")
    needed = max(lengths) + config.sampling.max_response_length
    if needed > config.seq_length:
        raise ValueError(
            f"a context of {max(lengths)} tokens plus a response of "
            f"{config.sampling.max_response_length} needs {needed} positions, but --seq-length is "
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


def _check_objective(config: RLConfig) -> None:
    if config.overlong_buffer_length:  # raises for a buffer that does not fit
        overlong_penalty(
            torch.zeros(1),
            max_response_length=config.sampling.max_response_length,
            buffer_length=config.overlong_buffer_length,
            penalty_factor=config.overlong_penalty_factor,
        )
    if not config.importance_threshold > 0:
        raise ValueError(
            f"--rl-importance-sampling-truncation-coef is {config.importance_threshold}; it must be positive"
        )
    counts = {
        "--max-sampling-rounds": config.max_sampling_rounds,
        "--logits-chunk-size": config.logits_chunk_size,
        "--rl-sequence-packing-max-sequences-per-bin": config.max_sequences_per_row,
    }
    for flag, count in counts.items():
        if count < 1:
            raise ValueError(f"{flag} is {count}; it must be at least 1")


def _refuse_unsupported(args: Namespace) -> None:
    engine = "the static inference engine cannot generate with it"
    static = not args.inference_dynamic_batching
    refused = {
        "--perform-rl-step": (args.perform_rl_step, "it switches on Megatron's own RL loop"),
        "--sequence-parallel": (args.sequence_parallel, "log-probs are taken from hidden states of whole sequences"),
        "--cuda-graph-impl local": (
            args.cuda_graph_impl == "local" and static,
            "without --inference-dynamic-batching it captures training forwards, whose replay runs no hook",
        ),
        "--context-parallel-size": (args.context_parallel_size > 1, engine),
        "--num-layers-per-virtual-pipeline-stage": (
            args.virtual_pipeline_model_parallel_size is not None,
            engine,
        ),
        "--calculate-per-token-loss": (
            args.calculate_per_token_loss,
            "--loss-aggregation says how tokens are averaged",
        ),
        "--rampup-batch-size": (args.rampup_batch_size is not None, "rollout batches are fixed"),
        "--grpo-entropy-term-weight": (args.grpo_entropy_term_weight != 0, "not implemented"),
        "--grpo-kl-beta, --fp8-param-gather and --fp8-recipe delayed": (
            args.grpo_kl_beta > 0 and args.fp8_param_gather and args.fp8_recipe == "delayed",
            "a resumed run would quantise the reference by another scale than the run began with; choose --fp8-recipe "
            "tensorwise, blockwise or mxfp8, or leave --fp8-param-gather out",
        ),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ValueError(f"the RL program does not work with {flag}: {reason}")
