"""From rollouts to the micro-batches of optimizer steps: layout alone, no communication.

Shapes: n responses of a rollout batch, R response tokens, b rows of a micro-batch, s tokens of a
padded sequence (prompt, response, padding, in this order).

Every rank holds the whole rollout batch, so which response is trained in which step is a function
of (seed, rollout step) and does not depend on the layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_longact.rl.arguments import GRPOConfig

Row = int
"""Index of a response in its rollout batch."""


@dataclass
class RolloutBatch:
    """All responses of one rollout step with what training on them needs; CPU tensors.

    prompts: n prompts; responses: int64 [n, R]; lengths: int64 [n] of the responses;
    rollout_log_probs: fp32 [n, R]; rewards: fp32 [n]; correct: bool [n]; finished: bool [n];
    advantages: fp32 [n]; old_log_probs and ref_log_probs: fp32 [n, R] by the trainer's forward,
    None until they are known (the reference: None without a KL penalty); importance_weights: fp32
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

    def total_length(self, row: Row) -> int:
        """Tokens of a row's prompt and response."""
        return len(self.prompts[row]) + int(self.lengths[row])

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


@dataclass(frozen=True)
class MicroBatchPlan:
    """Which rows a micro-batch holds on this replica, and the longest row on any replica."""

    rows: tuple[Row, ...]
    longest: int


@dataclass(frozen=True)
class StepPlan:
    """All rows of an optimizer step, and this replica's micro-batches of it."""

    rows: tuple[Row, ...]
    micro_batches: tuple[MicroBatchPlan, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward sees.

    rows: which responses of the rollout batch, b of them; tokens, position_ids: int64 [b, s];
    token_mask: bool [b, s], True at prompt and response tokens; positions: int64 [b, R], where the
    hidden state stands that predicts each response token; targets: int64 [b, R]; response_mask:
    bool [b, R]; advantages: fp32 [b]; old_log_probs, ref_log_probs, importance_weights: fp32 [b, R]
    or None; selected: bool [b, R], the tokens that a covariance objective treats apart, or None.
    """

    rows: tuple[Row, ...]
    tokens: Tensor
    position_ids: Tensor
    token_mask: Tensor
    positions: Tensor
    targets: Tensor
    response_mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    importance_weights: Tensor | None
    selected: Tensor | None

    def cuda(self) -> MicroBatch:
        """A copy on this process's device."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in values.items()}
        return MicroBatch(**moved)


def plan_steps(
    batch: RolloutBatch,
    *,
    seed: int,
    epochs: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[StepPlan]:
    """The optimizer steps on a rollout batch, with this replica's micro-batches of each.

    Each epoch goes once through the batch in a new random order, `global_batch_size` rows a step.
    Inside a step rows are sorted by length, so that a micro-batch holds little padding, and dealt
    out to the replicas in turn, so that all have the same work and the same shapes.
    """
    steps: list[StepPlan] = []
    stretch = micro_batch_size * dp_size
    for epoch in range(epochs):
        order = _random_order(len(batch), seed, batch.step, epoch)
        for begin in range(0, len(order), global_batch_size):
            rows = sorted(order[begin : begin + global_batch_size], key=batch.total_length)
            stretches = [rows[i : i + stretch] for i in range(0, len(rows), stretch)]
            micro_batches = tuple(
                MicroBatchPlan(
                    rows=tuple(together[dp_rank::dp_size]),
                    longest=batch.total_length(together[-1]),
                )
                for together in stretches
            )
            steps.append(StepPlan(rows=tuple(rows), micro_batches=micro_batches))
    return steps


def make_micro_batch(
    batch: RolloutBatch,
    plan: MicroBatchPlan,
    *,
    pad_token: int,
    multiple_of: int,
    fixed_length: int | None = None,
    selected: Tensor | None = None,
) -> MicroBatch:
    """Put rows of a rollout batch side by side, padded on the right.

    Sequences are as long as the plan's longest row, rounded up to a multiple of `multiple_of`, or
    `fixed_length` long if that is given (pipeline stages exchange one fixed shape). selected: bool
    [n, R] of the whole rollout batch, if the objective has a selection.
    """
    rows = plan.rows
    lengths = [batch.total_length(row) for row in rows]
    s = fixed_length or round_up(plan.longest, multiple_of)
    tokens = torch.full((len(rows), s), pad_token, dtype=torch.int64)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt = batch.prompts[row]
        tokens[i, : len(prompt)] = torch.tensor(prompt)
        tokens[i, len(prompt) : length] = batch.responses[row, : length - len(prompt)]
    index = list(rows)
    r = int(batch.lengths[index].max())
    prompt_lengths = torch.tensor([len(batch.prompts[row]) for row in rows])
    positions = (prompt_lengths - 1).unsqueeze(-1) + torch.arange(r)

    def of_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index, :r]

    return MicroBatch(
        rows=rows,
        tokens=tokens,
        position_ids=torch.arange(s).expand(len(rows), s).contiguous(),
        token_mask=torch.arange(s) < torch.tensor(lengths).unsqueeze(-1),
        positions=positions.clamp(max=s - 1),
        targets=batch.responses[index, :r],
        response_mask=batch.response_mask[index, :r],
        advantages=batch.advantages[index],
        old_log_probs=of_rows(batch.old_log_probs),
        ref_log_probs=of_rows(batch.ref_log_probs),
        importance_weights=of_rows(batch.importance_weights),
        selected=of_rows(selected),
    )


@dataclass(frozen=True)
class BatchLayout:
    """How rollout batches become micro-batches on this replica."""

    config: GRPOConfig
    pad_token: int
    multiple_of: int
    dp_rank: int
    dp_size: int
    pp_size: int

    def plan(self, batch: RolloutBatch) -> list[StepPlan]:
        """The optimizer steps on a batch."""
        return plan_steps(
            batch,
            seed=self.config.seed,
            epochs=self.config.epochs,
            global_batch_size=self.config.global_batch_size,
            micro_batch_size=self.config.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
        )

    def micro_batch(self, batch: RolloutBatch, plan: MicroBatchPlan, *, selected: Tensor | None = None) -> MicroBatch:
        """A micro-batch; of one fixed length if pipeline stages must know it."""
        return make_micro_batch(
            batch,
            plan,
            pad_token=self.pad_token,
            multiple_of=self.multiple_of,
            fixed_length=self._fixed_length,
            selected=selected,
        )

    def padding_share(self, batch: RolloutBatch, plan: StepPlan) -> float:
        """Share of the positions of an optimizer step that hold padding, on all replicas."""
        real = sum(batch.total_length(row) for row in plan.rows)
        padded = [self._fixed_length or round_up(mb.longest, self.multiple_of) for mb in plan.micro_batches]
        rows = [len(mb.rows) * self.dp_size for mb in plan.micro_batches]
        return 1 - real / sum(n * s for n, s in zip(rows, padded, strict=True))

    @property
    def _fixed_length(self) -> int | None:
        return self.config.seq_length if self.pp_size > 1 else None


def round_up(length: int, multiple_of: int) -> int:
    """The smallest multiple that is at least `length`."""
    return -(-length // multiple_of) * multiple_of


def _random_order(n: int, *key: int) -> list[Row]:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).permutation(n).tolist()
