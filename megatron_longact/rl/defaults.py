"""What the RL program does where a flag is not given and Megatron's own default is nobody's: docs/algorithms.md."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES

CLIP = ("--grpo-clamp-eps-lower", "--grpo-clamp-eps-upper")
SAVE_INTERVAL = "--save-interval"
DEFAULTS = {
    CLIP[0]: 0.2,
    CLIP[1]: 0.28,
    "--grpo-group-size": 8,
    "--grpo-iterations": 1,
    "--micro-batch-size": 1,
    SAVE_INTERVAL: 100,
}
"""Of Megatron's flags, in place of its own: 0.01, 0.01, 2, 2, and twice none, which ends in an assertion."""

NEEDLE_RESPONSE, LONGEST_DEFAULT_RESPONSE = 16, 1024


def set_defaults(parser: ArgumentParser) -> None:
    """Of flags that Megatron has added."""
    parser.set_defaults(**{_name(flag): value for flag, value in DEFAULTS.items()})


def settle_defaults(args: Namespace, argv: Sequence[str]) -> None:
    """Set what depends on other flags, and `args.rl_defaults`: the flags that were not given, with their values.

    Raises ValueError where there is no default that fits.
    """
    given = {word.partition("=")[0] for word in argv}
    chosen: dict[str, float] = {
        flag: value for flag, value in DEFAULTS.items() if flag != SAVE_INTERVAL or getattr(args, "save", None)
    }
    for flag, value in zip(CLIP, POLICY_LOSSES[args.policy_loss].usual_clip or (), strict=False):
        if flag not in given and getattr(args, _name(flag)) == DEFAULTS[flag]:
            chosen[flag] = value
            setattr(args, _name(flag), value)
    if args.max_response_length is None:
        quarter = max(1, min(args.seq_length // 4, LONGEST_DEFAULT_RESPONSE))
        args.max_response_length = quarter if args.train_data or args.heldout_data else NEEDLE_RESPONSE
        chosen["--max-response-length"] = args.max_response_length
    args.heldout_context_lengths = args.heldout_context_lengths or args.context_lengths
    if not getattr(args, "_is_global_batch_size_explicitly_specified", True):  # Megatron's: one micro-batch a replica
        args.global_batch_size = _responses_per_step(args)
        chosen["--global-batch-size"] = args.global_batch_size
    args.rl_defaults = [f"{flag} {value}" for flag, value in chosen.items() if flag not in given]


def _responses_per_step(args: Namespace) -> int:
    count: int = args.grpo_prompts_per_step * args.grpo_group_size
    if count % (args.micro_batch_size * args.data_parallel_size):
        raise ValueError(
            f"--global-batch-size is not given, and the {count} responses of a rollout batch do not divide into "
            f"--micro-batch-size {args.micro_batch_size} x {args.data_parallel_size} replicas: change one of them"
        )
    return count


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
