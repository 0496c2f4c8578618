"""Policy losses by name; each is one small module, and what they share is `policy_loss`."""

from megatron_longact.rl.objectives.policy_losses.cispo import cispo_token_losses
from megatron_longact.rl.objectives.policy_losses.clip_cov import clip_cov_token_losses, select_clip_cov
from megatron_longact.rl.objectives.policy_losses.clipped import clipped_token_losses
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.gspo import gspo_token_losses
from megatron_longact.rl.objectives.policy_losses.kl_cov import kl_cov_token_losses, select_kl_cov
from megatron_longact.rl.objectives.policy_losses.policy_loss import PolicyLoss

__all__ = ["POLICY_LOSSES", "PolicyLoss", "PolicyLossConfig"]

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(token_losses=clipped_token_losses),
    "dapo": PolicyLoss(token_losses=clipped_token_losses),
    "kl-cov": PolicyLoss(token_losses=kl_cov_token_losses, selection=select_kl_cov),
    "clip-cov": PolicyLoss(token_losses=clip_cov_token_losses, selection=select_clip_cov),
    "gspo": PolicyLoss(token_losses=gspo_token_losses, fixed_aggregation="seq-mean-token-mean"),
    "cispo": PolicyLoss(token_losses=cispo_token_losses),
}
