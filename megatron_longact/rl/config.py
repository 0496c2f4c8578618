"""What an RL run is, beside Megatron's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_longact.generation.sampling import Sampling
from megatron_longact.rl.data.arguments import DataConfig
from megatron_longact.rl.objectives.importance_weights import Level
from megatron_longact.rl.objectives.kl import KLKind
from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """One RL run, from the flags; `rl_config_from_args` checks them."""

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
    dynamic_sampling: bool = False
    """Throw groups out whose rewards are all equal, and sample on."""
    max_sampling_rounds: int = 1
    """Rounds of prompts_per_step prompts that dynamic sampling makes at most."""
    overlong_buffer_length: int = 0
    """Response tokens before the longest one over which the punishment grows; 0: no punishment."""
    overlong_penalty_factor: float = 1.0
    importance_level: Level | None = None
    """Of the weights that correct for rollouts that differ from the trainer; None: no correction."""
    importance_threshold: float = 2.0
    offload_reference: bool = False
    """Keep the reference weights on the host."""
    logits_chunk_size: int = 1024
    pack_sequences: bool = False
    """Several responses in one row of `seq_length` tokens at most (thd)."""
    max_sequences_per_row: int = 50
    data: DataConfig = field(default_factory=DataConfig)
    tasks: tuple[str, ...]
    context_lengths: tuple[int, ...]
    heldout_context_lengths: tuple[int, ...]
    heldout_prompts: int
    """Held-out prompts for each context length."""
    seed: int
    expected_gain: float | None = None
    """Points of held-out accuracy; the report says so if a run gains less."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that fit beside a response."""
        return self.seq_length - self.sampling.max_response_length

    @property
    def responses_per_step(self) -> int:
        """Responses of one rollout batch."""
        return self.prompts_per_step * self.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on one rollout batch."""
        return self.epochs * self.responses_per_step // self.global_batch_size

    @property
    def remarks(self) -> list[str]:
        """What a user should know before it runs, a line each."""
        if self.policy_loss == "kl-cov" and self.updates_per_step == 1:
            return [
                "--policy-loss kl-cov with one optimizer step a rollout batch is the unclipped policy gradient: its "
                "penalty is zero while the policy is the one that sampled; give more --grpo-iterations or a smaller "
                "--global-batch-size"
            ]
        return []
