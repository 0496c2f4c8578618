"""What one forward and backward sees, made from a rollout batch: padded rows, or one packed row, prompts shared or not.

Shapes: n responses of a rollout batch, R response tokens, b rows of a micro-batch, s tokens of a
padded sequence (prompt, response, padding, in this order), t tokens of a packed row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_longact.rl.batches.packing import packed_row, round_up
from megatron_longact.rl.batches.plans import MicroBatchPlan, Packing, StepPlan, Use, plan_steps
from megatron_longact.rl.batches.rollout_batch import RolloutBatch, Row
from megatron_longact.rl.batches.row_parts import RowPart, row_part
from megatron_longact.rl.batches.segments import SharedRow, shared_row
from megatron_longact.rl.config import RLConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward sees.

    rows: which responses of the rollout batch, b of them; tokens, position_ids: int64 [b, s], or
    [1, t] if they are packed into one row; token_mask: bool, the same shape, True at prompt and
    response tokens; positions: int64 [b, R], where in the flattened [s, b] or [t, 1] hidden states the
    one stands that predicts each response token; cu_seqlens: int32 bounds of packed sequences, None
    if they are not packed, or share prompts: then `shared` says what stands where; targets: int64
    [b, R]; response_mask: bool [b, R]; advantages: fp32 [b]; old_log_probs, ref_log_probs,
    importance_weights: fp32 [b, R] or None; selected: bool [b, R], the tokens that a covariance
    objective treats apart, or None; part: under context parallelism what this rank has of the rows.
    """

    rows: tuple[Row, ...]
    tokens: Tensor
    position_ids: Tensor
    token_mask: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None
    targets: Tensor
    response_mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    importance_weights: Tensor | None
    selected: Tensor | None
    shared: SharedRow | None = None
    part: RowPart | None = None

    def cuda(self) -> MicroBatch:
        """A copy on this process's device."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: v.cuda() if isinstance(v, Tensor | RowPart) else v for name, v in values.items()}
        return MicroBatch(**moved)

    def shared_by(self, cp_size: int, *, cp_rank: int) -> MicroBatch:
        """The same as one of so many context-parallel ranks sees it."""
        if cp_size == 1:
            return self
        rows, length = self.tokens.shape
        part = row_part(
            self.positions,
            self.response_mask,
            bounds=torch.tensor([0, length]) if self.cu_seqlens is None else self.cu_seqlens,
            num_rows=rows,
            cp_rank=cp_rank,
            cp_size=cp_size,
        )
        return dataclasses.replace(self, part=part)


def make_micro_batch(
    batch: RolloutBatch,
    plan: MicroBatchPlan,
    *,
    pad_token: int,
    multiple_of: int,
    fixed_length: int | None = None,
    selected: Tensor | None = None,
    packing: Packing | None = None,
) -> MicroBatch:
    """Put rows of a rollout batch side by side, padded on the right, or with `packing` one behind the other in one row.

    They are as long as the plan's longest row, rounded up to a multiple of `multiple_of`, or
    `fixed_length` long if that is given (pipeline stages exchange one fixed shape). selected: bool
    [n, R] of the whole rollout batch, if the objective has a selection.
    """
    length = fixed_length or round_up(plan.longest, multiple_of)
    index = list(plan.rows)
    r = int(batch.lengths[index].max())
    make: Any = _padded_rows if packing is None else _shared_row
    if packing is not None and not packing.shares_prompts:
        make = partial(_packed_row, multiple_of=packing.sequence_multiple)

    def of_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index, :r]

    return MicroBatch(
        rows=plan.rows,
        **make(batch, plan.rows, length, r, pad_token),
        targets=batch.responses[index, :r],
        response_mask=batch.response_mask[index, :r],
        advantages=batch.advantages[index],
        old_log_probs=of_rows(batch.old_log_probs if batch.knows_old_log_probs(index) else None),
        ref_log_probs=of_rows(batch.ref_log_probs),
        importance_weights=of_rows(batch.importance_weights),
        selected=of_rows(selected),
    )


def _padded_rows(batch: RolloutBatch, rows: Sequence[Row], length: int, r: int, pad_token: int) -> dict[str, Any]:
    sequences = [batch.sequence(row) for row in rows]
    tokens = torch.full((len(rows), length), pad_token, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    places = torch.arange(length)
    position_ids = places.clamp(max=max(map(len, sequences)) - 1)  # padding needs no row of a table of positions
    positions = _predicting(batch, rows, torch.zeros(len(rows), dtype=torch.int64), length=length, r=r)
    return {
        "tokens": tokens,
        "position_ids": position_ids.expand_as(tokens).contiguous(),
        "token_mask": places < torch.tensor([len(sequence) for sequence in sequences]).unsqueeze(-1),
        "positions": positions * len(rows) + torch.arange(len(rows)).unsqueeze(-1),  # [s, b] flattened
        "cu_seqlens": None,
    }


def _packed_row(
    batch: RolloutBatch, rows: Sequence[Row], length: int, r: int, pad_token: int, *, multiple_of: int
) -> dict[str, Any]:
    sequences = [batch.sequence(row) for row in rows]
    tokens, position_ids, token_mask, cu_seqlens = packed_row(
        sequences, length=length, pad_token=pad_token, multiple_of=multiple_of
    )
    return {
        "tokens": tokens,
        "position_ids": position_ids,
        "token_mask": token_mask,
        "positions": _predicting(batch, rows, cu_seqlens[: len(rows)], length=length, r=r),
        "cu_seqlens": cu_seqlens,
    }


def _shared_row(batch: RolloutBatch, rows: Sequence[Row], length: int, r: int, pad_token: int) -> dict[str, Any]:
    lengths = batch.lengths[list(rows)].tolist()
    row = shared_row([batch.prompts[row] for row in rows], lengths, num_tokens=length)
    responses = iter(zip(batch.responses[list(rows)], lengths, strict=True))
    tokens = torch.full((length,), pad_token, dtype=torch.int64)
    for group, first in zip(row.groups, row.first_responses, strict=True):
        tokens[slice(*group.prompt)] = torch.tensor(batch.prompts[rows[first]])
        for own in group.responses:
            response, count = next(responses)
            tokens[slice(*own)] = response[:count]
    return {
        "tokens": tokens[None],
        "position_ids": row.positions[None],
        "token_mask": (torch.arange(length) < row.end)[None],
        "positions": row.predicting(r),
        "cu_seqlens": None,
        "shared": row,
    }


def _predicting(batch: RolloutBatch, rows: Sequence[Row], begins: Tensor, *, length: int, r: int) -> Tensor:
    """Where in its row the token stands that predicts each response token: [b, r], the first at the prompt's end."""
    first = begins + torch.tensor([len(batch.prompts[row]) - 1 for row in rows])
    return (first.unsqueeze(-1) + torch.arange(r)).clamp(max=length - 1)


@dataclass(frozen=True)
class BatchLayout:
    """How rollout batches become micro-batches on this replica."""

    config: RLConfig
    pad_token: int
    multiple_of: int
    dp_rank: int
    dp_size: int
    pp_size: int
    cp_rank: int = 0
    cp_size: int = 1
    step_multiple: int = 1
    """Of the micro-batches of a step on each replica: an interleaved pipeline takes them in groups."""

    @classmethod
    def of_rank(
        cls, config: RLConfig, pgs: ProcessGroupCollection, *, pad_token: int, multiple_of: int, step_multiple: int = 1
    ) -> BatchLayout:
        """That of this rank in Megatron's process groups."""
        return cls(
            config,
            pad_token,
            multiple_of,
            dp_rank=pgs.dp.rank(),
            dp_size=pgs.dp.size(),
            pp_size=pgs.pp.size(),
            cp_rank=pgs.cp.rank(),
            cp_size=pgs.cp.size(),
            step_multiple=step_multiple,
        )

    def plan(self, batch: RolloutBatch, use: Use | None = None) -> list[StepPlan]:
        """The optimizer steps on a batch; those that are left, if it is in use."""
        use = use or self.new_use()
        return plan_steps(
            batch,
            seed=use.seed,
            epochs=use.epochs,
            done=use.done,
            global_batch_size=self.config.global_batch_size,
            micro_batch_size=self.config.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            packing=self.packing,
            multiple_of=self.step_multiple,
        )

    def new_use(self) -> Use:
        """The use of a batch that is begun now."""
        return Use(seed=self.config.seed, epochs=self.config.epochs)

    def micro_batch(self, batch: RolloutBatch, plan: MicroBatchPlan, *, selected: Tensor | None = None) -> MicroBatch:
        """A micro-batch; of one fixed length if pipeline stages must know it."""
        return make_micro_batch(
            batch,
            plan,
            pad_token=self.pad_token,
            multiple_of=self.multiple_of,
            fixed_length=self._fixed_length,
            selected=selected,
            packing=self.packing,
        ).shared_by(self.cp_size, cp_rank=self.cp_rank)

    @property
    def packing(self) -> Packing | None:
        """How responses are packed; None if each has a row of its own."""
        config = self.config
        if not config.pack_sequences and not config.shared_prompts:
            return None
        # a shared row takes the place of a micro-batch of padded ones, and may be as long as they are together
        rows = 1 if config.pack_sequences or self.pp_size > 1 else config.micro_batch_size
        return Packing(
            capacity=rows * config.seq_length,
            max_sequences=config.max_sequences_per_row if config.pack_sequences else config.global_batch_size,
            shares_prompts=bool(config.shared_prompts),
            sequence_multiple=2 * self.cp_size if self.cp_size > 1 else 1,
        )

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch."""
        return self.config.micro_batch_size if self.packing is None else 1

    def padding_share(self, plan: StepPlan) -> float:
        """Share of the positions of an optimizer step that hold padding, on all replicas."""
        positions = 0
        for part in plan.micro_batches:
            rows = 1 if self.packing is not None else len(part.rows)
            positions += rows * (self._fixed_length or round_up(part.longest, self.multiple_of))
        return 1 - plan.tokens / (positions * self.dp_size)

    @property
    def _fixed_length(self) -> int | None:
        return self.config.seq_length if self.pp_size > 1 else None
