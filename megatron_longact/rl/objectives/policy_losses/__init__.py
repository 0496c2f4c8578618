"""Policy losses by name; each is one small module, and what they share is `policy_loss`."""

from megatron_longact.rl.objectives.policy_losses.cispo import CISPO
from megatron_longact.rl.objectives.policy_losses.clipped import CLIPPED
from megatron_longact.rl.objectives.policy_losses.config import PolicyLossConfig
from megatron_longact.rl.objectives.policy_losses.covariance import CLIP_COV, KL_COV
from megatron_longact.rl.objectives.policy_losses.gspo import GSPO
from megatron_longact.rl.objectives.policy_losses.policy_loss import KL_OLD, PolicyLoss

__all__ = ["POLICY_LOSSES", "PolicyLoss", "PolicyLossConfig", "loss_metrics"]

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": CLIPPED,
    "dapo": CLIPPED,
    "kl-cov": KL_COV,
    "clip-cov": CLIP_COV,
    "gspo": GSPO,
    "cispo": CISPO,
}


def loss_metrics() -> tuple[str, ...]:
    """What any of the losses reports, each name once: the columns of every run, so that runs can be compared."""
    declared = (name for loss in POLICY_LOSSES.values() for name in loss.metrics)
    return (*dict.fromkeys(declared), KL_OLD)
