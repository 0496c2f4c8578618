"""Reinforcement learning on Megatron's own training step, with LongAct: tasks, rollouts, objective, outer loop.

The objectives alone need torch and nothing else; they can be used in any trainer.
"""

from megatron_longact.rl.objectives.advantages import group_relative_advantages, overlong_penalty
from megatron_longact.rl.objectives.aggregation import aggregate, aggregation_weight
from megatron_longact.rl.objectives.importance_weights import truncated_importance_weights
from megatron_longact.rl.objectives.kl import kl_penalty
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES, PolicyLoss, PolicyLossConfig

__all__ = [
    "POLICY_LOSSES",
    "PolicyLoss",
    "PolicyLossConfig",
    "aggregate",
    "aggregation_weight",
    "group_relative_advantages",
    "kl_penalty",
    "overlong_penalty",
    "truncated_importance_weights",
]
