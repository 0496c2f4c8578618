"""What an RL run is, beside Megatron's own arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from megatron_longact.flags import Flag, MegatronFlag
from megatron_longact.generation.sampling import Sampling
from megatron_longact.rl.data.arguments import DataConfig
from megatron_longact.rl.objectives.importance_weights import Level
from megatron_longact.rl.objectives.kl import KLKind
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES, PolicyLossConfig

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How much of what the model says is kept. Raises `ValueError` for what is no number."""

    rollouts: Annotated[str, Flag("--log-rollouts", metavar="N")] = "8"
    """Answers of each rollout step that are written to rollouts.jsonl and to TensorBoard, from all over its prompts; of
    each round with dynamic sampling. A number, all, or 0 for none."""
    heldout: Annotated[str, Flag("--log-heldout", metavar="N")] = "16"
    """Answers of each held-out evaluation that are written to heldout.jsonl and to TensorBoard, those to the same
    prompts each time. A number, all, or 0 for none."""
    prompt_tokens: Annotated[int, Flag("--log-prompt-tokens")] = 200
    """Tokens at the end of a prompt that are written beside its answer."""

    def __post_init__(self) -> None:
        for flag, value in (("--log-rollouts", self.rollouts), ("--log-heldout", self.heldout)):
            if value != ALL and not value.isdecimal():
                raise ValueError(f"{flag} is {value}; give a number of answers, all, or 0 for none")
        if self.prompt_tokens < 0:
            raise ValueError(f"--log-prompt-tokens is {self.prompt_tokens}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """One RL run, from the flags; `rl_config_from_args` checks them."""

    run_dir: str
    """Folder for metrics.jsonl, evaluations.jsonl, answers of the model (`longact show`), the report and Megatron's own
    output."""
    overwrite: bool = False
    """Start anew: remove what an earlier run left in --run-dir, and the checkpoints in --save."""
    save_first_iteration: bool = False
    """Save a checkpoint after the first iteration as well, beside Megatron's --save-interval."""
    export_hf_interval: int = 0
    """Optimizer steps between two exports of the model, while it trains, as Hugging Face folders hf-iter_... in
    --run-dir, each out of a checkpoint that is saved for it. Default: 0, none."""
    expected_gain: float | None = None
    """Points of held-out accuracy; the report says so if a run gains less."""
    needle_tasks: tuple[str, ...] = ()
    """Needle tasks to train and evaluate on. Default: all."""
    context_lengths: tuple[int, ...] = ()
    """Prompt lengths of the needle tasks in tokens, drawn with equal chance; of RULER's with the response, as RULER
    counts."""
    heldout_context_lengths: tuple[int, ...] = ()
    """Those of the held-out needle and RULER tasks. Default: those of training."""
    max_response_length: Annotated[int, Flag(needed=False)]
    """Tokens of a response at most, the end-of-text token included. Default: 16 for the needle tasks alone; with data
    sets a quarter of --seq-length, at most 1024."""
    policy_loss: Annotated[str, Flag(choices=sorted(POLICY_LOSSES))] = "grpo"
    """The objective."""
    kl_estimator: KLKind = "k3"
    """Estimator of the KL penalty (--grpo-kl-beta)."""
    normalize_advantages: Annotated[bool, Flag("--no-advantage-std")] = True
    """Advantages are divided by their group's standard deviation; with this flag they are not (Dr. GRPO)."""

    count_bf16_changes: bool = False
    """After each step count the elements of the weights whose value in bf16 is another one (bf16/... in metrics.jsonl);
    two bf16 copies of what a rank owns stay on the host for it."""
    offload_reference: bool = False
    """Keep the reference weights of the KL penalty on the host."""
    logits_chunk_size: int = 1024
    """Tokens whose logits are in memory at once; what is beyond is made again in the backward."""
    max_sampling_rounds: int = 10
    """With --grpo-filter-groups-with-same-reward: rounds of --grpo-prompts-per-step prompts that are sampled at most
    to fill a batch."""
    overlong_buffer_length: int = 0
    """Tokens before --max-response-length over which a response's reward falls (DAPO's soft overlong punishment).
    Default: 0, no punishment."""
    overlong_penalty_factor: float = 1.0
    """What a response of full length loses."""
    importance_sampling_level: Level = "token"
    """With --rl-inference-logprobs-is-correction: whether tokens are weighted or whole responses."""
    prompts_per_step: Annotated[int, MegatronFlag("--grpo-prompts-per-step")]
    """Prompts of a rollout batch."""
    group_size: Annotated[int, MegatronFlag("--grpo-group-size")]
    """Responses to each prompt; advantages are relative to their group."""
    epochs: Annotated[int, MegatronFlag("--grpo-iterations")]
    """Times that each rollout batch is gone through."""
    dynamic_sampling: Annotated[bool, MegatronFlag("--grpo-filter-groups-with-same-reward")] = False
    """DAPO's dynamic sampling: throw groups out whose rewards are all equal, and sample on."""
    global_batch_size: Annotated[int, MegatronFlag()]
    """Responses of an optimizer step."""
    micro_batch_size: Annotated[int, MegatronFlag()]
    """Responses of a forward."""
    seq_length: Annotated[int, MegatronFlag()]
    """Longest prompt plus response, in tokens."""
    pack_sequences: Annotated[bool, MegatronFlag("--rl-use-sequence-packing")] = False
    """Several responses in one row of at most --seq-length tokens."""
    max_sequences_per_row: Annotated[int, MegatronFlag("--rl-sequence-packing-max-sequences-per-bin")] = 50
    """Responses of such a row at most."""
    shared_prompts: bool | None = None
    """Responses to one prompt stand in a row behind one copy of it, in training and for log-probs. Default: where the
    model's attention can."""
    kl_beta: Annotated[float, MegatronFlag("--grpo-kl-beta")]
    """Weight of the KL penalty."""
    temperature: Annotated[float, MegatronFlag("--rl-default-temperature")] = 1.0
    """Logits are divided by this when responses are drawn."""
    top_p: Annotated[float, MegatronFlag("--rl-default-top-p")] = 0.0
    """Smallest set of tokens with at least this probability; 0 and 1: all."""
    top_k: Annotated[int, MegatronFlag("--rl-default-top-k")] = 0
    """Only the k likeliest tokens; 0 and below: all."""
    corrects_rollouts: Annotated[bool, MegatronFlag("--rl-inference-logprobs-is-correction")] = False
    """Weight tokens by the ratio of the trainer's probability to the rollout engine's, where these differ."""
    importance_threshold: Annotated[float, MegatronFlag("--rl-importance-sampling-truncation-coef")] = 2.0
    """Bound of these weights; not given: 2."""
    heldout_prompts: Annotated[int, MegatronFlag("--rl-prompts-per-eval")]
    """Held-out prompts for each context length."""
    seed: Annotated[int, MegatronFlag()]
    """Of the model, of the tasks and of what is drawn."""
    loss: PolicyLossConfig
    data: DataConfig = field(default_factory=DataConfig)
    answers: AnswerFlags = field(default_factory=AnswerFlags)

    @property
    def sampling(self) -> Sampling:
        """How responses are drawn; raises ValueError as `Sampling` does."""
        return Sampling(
            max_response_length=self.max_response_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )

    @property
    def sampling_rounds(self) -> int:
        """Rounds of `prompts_per_step` prompts that fill a rollout batch at most."""
        return self.max_sampling_rounds if self.dynamic_sampling else 1

    @property
    def importance_level(self) -> Level | None:
        """Of the weights that correct for rollouts that differ from the trainer; None: no correction."""
        return self.importance_sampling_level if self.corrects_rollouts else None

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that fit beside a response."""
        return self.seq_length - self.max_response_length

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
