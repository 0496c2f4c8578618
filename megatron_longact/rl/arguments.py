"""Flags of the RL program, and what Megatron's own flags must fulfil for it.

Whatever Megatron has a flag for keeps that flag: `--grpo-prompts-per-step`, `--grpo-group-size`,
`--grpo-iterations`, `--grpo-clamp-eps-lower/upper`, `--grpo-kl-beta`, `--rl-default-temperature`,
`--rl-default-top-p`, `--rl-default-top-k`, `--rl-prompts-per-eval` (here: for each context length),
`--eval-interval`, `--inference-max-requests` (responses made at once), `--global-batch-size`
(responses an optimizer step), `--seq-length` (longest prompt plus response). Megatron checks its RL
flags only with `--perform-rl-step`, which belongs to its own loop, so they are checked here.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import get_args

from megatron_longact.rl.policy_loss import POLICY_LOSSES, Aggregation, KLKind, PolicyLossConfig
from megatron_longact.rl.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """One GRPO run, from the flags; `grpo_config_from_args` checks them."""

    prompts_per_step: int
    group_size: int
    epochs: int
    """Times that each rollout batch is gone through (`--grpo-iterations`)."""
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    sampling: Sampling
    policy_loss: str
    loss: PolicyLossConfig
    kl_beta: float
    kl_estimator: KLKind
    normalize_advantages: bool
    tasks: tuple[str, ...]
    context_lengths: tuple[int, ...]
    heldout_context_lengths: tuple[int, ...]
    heldout_prompts: int
    """Held-out prompts for each context length."""
    seed: int

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout batch."""
        return self.prompts_per_step * self.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one rollout batch."""
        return self.epochs * self.responses_per_step // self.global_batch_size


def add_rl_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags that Megatron does not have; returns the parser."""
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
        required=True,
        help="Prompt lengths in tokens, drawn with equal chance.",
    )
    add(
        "--heldout-context-lengths",
        nargs="+",
        type=int,
        help="Prompt lengths of the held-out evaluation. Default: those of training.",
    )
    add(
        "--max-response-length",
        type=int,
        default=16,
        help="Tokens of a response at most, the end-of-text token included. Default: 16.",
    )
    add(
        "--policy-loss",
        default="grpo",
        choices=sorted(POLICY_LOSSES),
        help="The objective. Default: grpo.",
    )
    add(
        "--loss-aggregation",
        default="token-mean",
        choices=get_args(Aggregation),
        help="How token losses become one number. Default: token-mean.",
    )
    add("--dual-clip", type=float, help="Bound of the loss at negative advantages. Default: off.")
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
        "--save-first-iteration",
        action="store_true",
        help="Save a checkpoint after the first iteration as well, beside Megatron's --save-interval.",
    )
    return parser


def grpo_config_from_args(args: Namespace) -> GRPOConfig:
    """The run that the flags ask for.

    Raises ValueError, in one line, for a value that makes no sense, for what the rollout engine
    cannot do, and for Megatron's RL flags that would have no effect here.
    """
    _refuse_unsupported(args)
    context_lengths = tuple(args.context_lengths)
    config = GRPOConfig(
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
            aggregation=args.loss_aggregation,
        ),
        kl_beta=args.grpo_kl_beta,
        kl_estimator=args.kl_estimator,
        normalize_advantages=not args.no_advantage_std,
        tasks=tuple(args.needle_tasks or ()),
        context_lengths=context_lengths,
        heldout_context_lengths=tuple(args.heldout_context_lengths or context_lengths),
        heldout_prompts=args.rl_prompts_per_eval,
        seed=args.seed,
    )
    _check_lengths(config, max_position_embeddings=args.max_position_embeddings)
    _check_batches(config)
    return config


def _check_lengths(config: GRPOConfig, *, max_position_embeddings: int) -> None:
    lengths = config.context_lengths + config.heldout_context_lengths
    if min(lengths) < 1:
        raise ValueError(f"a context length is {min(lengths)}; it must be at least 1")
    needed = max(lengths) + config.sampling.max_response_length
    if config.seq_length > max_position_embeddings:
        raise ValueError(
            f"--seq-length is {config.seq_length}, longer than the model's "
            f"--max-position-embeddings {max_position_embeddings}"
        )
    if needed > config.seq_length:
        raise ValueError(
            f"a context of {max(lengths)} tokens plus a response of "
            f"{config.sampling.max_response_length} needs {needed} positions, but --seq-length is "
            f"{config.seq_length} (the model has {max_position_embeddings} positions)"
        )


def _check_batches(config: GRPOConfig) -> None:
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


def _refuse_unsupported(args: Namespace) -> None:
    engine = "the static inference engine cannot generate with it"
    refused = {
        "--perform-rl-step": (args.perform_rl_step, "it switches on Megatron's own RL loop"),
        "--sequence-parallel": (args.sequence_parallel, engine),
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
        "--grpo-filter-groups-with-same-reward": (
            args.grpo_filter_groups_with_same_reward,
            "not implemented",
        ),
        "--rl-use-sequence-packing": (args.rl_use_sequence_packing, "not implemented"),
        "--rl-inference-logprobs-is-correction": (
            args.rl_inference_logprobs_is_correction,
            "not implemented",
        ),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ValueError(f"the RL program does not work with {flag}: {reason}")
