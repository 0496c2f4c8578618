"""A rollout batch: every rank holds the whole of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = int
"""Index of a response in its rollout batch."""


@dataclass
class RolloutBatch:
    """All responses of one rollout step with what training on them needs; CPU tensors.

    prompts: n prompts; responses: int64 [n, R]; lengths: int64 [n] of the responses;
    rollout_log_probs: fp32 [n, R]; rewards: fp32 [n]; correct: bool [n]; finished: bool [n];
    advantages: fp32 [n]; old_log_probs and ref_log_probs: fp32 [n, R] by the trainer's forward,
    None before (the reference: None without a KL penalty), and the old ones NaN at the responses
    whose training forward is to say them, as it is the first; importance_weights: fp32
    [n, R] of the correction for rollouts that differ from the trainer, None without it; counts: what
    was thrown out on the way, for the metrics.
    """

    step: int
    prompts: list[tuple[int, ...]]
    responses: Tensor
    lengths: Tensor
    rollout_log_probs: Tensor
    rewards: Tensor
    correct: Tensor
    finished: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    importance_weights: Tensor | None = None
    counts: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def response_mask(self) -> Tensor:
        """Bool [n, R], True at response tokens."""
        return torch.arange(self.responses.shape[1]) < self.lengths.unsqueeze(-1)

    def knows_old_log_probs(self, rows: Sequence[Row]) -> bool:
        """Whether those of all these responses are there already."""
        return self.old_log_probs is not None and not self.old_log_probs[list(rows)].isnan().any()

    def total_length(self, row: Row) -> int:
        """Tokens of a row's prompt and response."""
        return len(self.prompts[row]) + int(self.lengths[row])

    def sequence(self, row: Row) -> Tensor:
        """Prompt and response of a row: int64 [total length]."""
        return torch.cat([torch.tensor(self.prompts[row]), self.responses[row, : self.lengths[row]]])

    def metrics(self) -> dict[str, float]:
        """What a training reports of the batch, by name; the log-probs must be known."""
        return {
            "reward_mean": self.rewards.mean().item(),
            "reward_std": self.rewards.std().item(),
            "accuracy": self.correct.float().mean().item(),
            "response_length_mean": self.lengths.float().mean().item(),
            "truncated_fraction": 1.0 - self.finished.float().mean().item(),
            "empty_fraction": (self.lengths == self.finished).float().mean().item(),
            "responses": float(len(self)),
            "prompt_tokens": float(sum(map(len, self.prompts))),
            "response_tokens": float(self.lengths.sum()),
            **self.counts,
            **self._mismatch_metrics(),
        }

    def _mismatch_metrics(self) -> dict[str, float]:
        """How far the distribution that was sampled is from the trainer's, at response tokens."""
        mask = self.response_mask
        assert self.old_log_probs is not None
        log_ratio = (self.old_log_probs - self.rollout_log_probs)[mask]
        metrics = {
            "rollout_train_logprob_abs_diff": log_ratio.abs().mean().item(),
            "rollout_train_logprob_abs_diff_max": log_ratio.abs().max().item(),
            "rollout_train_kl": (log_ratio.expm1() - log_ratio).mean().item(),
        }
        if self.importance_weights is not None:
            weights = self.importance_weights[mask]
            metrics["importance_weight_mean"] = weights.mean().item()
            metrics["importance_weight_max"] = weights.max().item()
        return metrics

    def select(self, rows: list[Row]) -> RolloutBatch:
        """Some of the responses, in the order of `rows`; without counts."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: v[rows] if isinstance(v, Tensor) else v for name, v in values.items()}
        return RolloutBatch(**(chosen | {"prompts": [self.prompts[row] for row in rows], "counts": {}}))

    @classmethod
    def concatenate(cls, batches: list[RolloutBatch]) -> RolloutBatch:
        """The responses of batches of one rollout step, one after the other; without counts."""
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            values = [getattr(batch, f.name) for batch in batches]
            joined[f.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
        return cls(**(joined | {"prompts": [p for batch in batches for p in batch.prompts], "counts": {}}))

    def state_dict(self) -> dict[str, Any]:
        """The fields as a plain dict; prompts are stored as one int32 tensor and their lengths."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        prompts = state.pop("prompts")
        state["prompt_tokens"] = torch.tensor([t for p in prompts for t in p], dtype=torch.int32)
        state["prompt_lengths"] = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RolloutBatch:
        """The batch that `state_dict` came from."""
        state = dict(state)
        lengths = state.pop("prompt_lengths").tolist()
        parts = state.pop("prompt_tokens").split(lengths)
        return cls(prompts=[tuple(part.tolist()) for part in parts], **state)
