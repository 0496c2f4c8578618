"""Log-probs of responses by the trainer's own forward, on vocabulary shards.

Shapes: b rows of a micro-batch, s tokens of a padded sequence, R response tokens, V padded
vocabulary, h hidden size.

Only the hidden states that predict a response token reach the output layer, through GPTModel's own
`output_processor` seam: at a context of s the logits take R/s of the memory and of the time, and
they are never gathered over tensor-parallel ranks. Long responses go through it in chunks, whose logits
the backward makes again, so that [chunk, V / tp] is all that ever exists of them. Under sequence parallelism each
rank has the hidden states of s / tp tokens: only those that are needed are put together, never whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from torch.utils.checkpoint import checkpoint

from megatron_longact.megatron.context_parallel import RowShare
from megatron_longact.megatron.planned_attention import PlannedSeqParams, rope_by_position
from megatron_longact.rl.batches.micro_batches import BatchLayout, MicroBatch
from megatron_longact.rl.batches.plans import StepPlan
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.batches.row_parts import RowPart


@dataclass(frozen=True)
class ResponseScorer:
    """Turns hidden states into log-probs of response tokens and entropies; an output processor.

    temperature: logits are divided by it, as they were when sampling; vocab_size: entries of the
    tokenizer: the model's padded ones get no probability, here as there.
    """

    temperature: float
    vocab_size: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup | None = None
    """Ranks that share rows, if they do: each scores the response tokens that its part predicts."""

    chunk_size: int = 1024
    """Tokens whose logits are in memory at once; beyond it the backward makes them again."""

    def forward(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """The model's output for a micro-batch: fp32 [2, b, R] on the last pipeline stage.

        [0] is log p of each response token, [1] the entropy where it was chosen, without gradient;
        both are garbage in the padding. Earlier stages return their hidden states.
        """
        everything = slice(None) if batch.part is None else batch.part.places
        with self._positions(model, batch):
            return model(
                batch.tokens[:, everything],
                batch.position_ids[:, everything],
                None,
                packed_seq_params=_packed_seq_params(batch, self.cp_group),
                output_processor=self._process,
                output_processor_context=batch,
            )

    def _positions(self, model: nn.Module, batch: MicroBatch) -> AbstractContextManager[None]:
        """To Megatron a shared row is one sequence, but its positions begin anew with each prompt and response."""
        return nullcontext() if batch.shared is None else rope_by_position(unwrap_model(model), batch.position_ids[0])

    def _process(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        scale_logits: Callable[[Tensor], Tensor],
        context: MicroBatch,
        **unused: Any,
    ) -> Tensor:
        index, targets = context.positions.t(), context.targets.t().contiguous()  # [R, b]
        if context.part is not None:  # [n, 1], as if of one response
            index = context.part.predicting.unsqueeze(1)
            targets = F.pad(context.targets.flatten(), (0, 1))[context.part.predicted].unsqueeze(1)
        hidden_states = self._predicting(hidden_states, index, split=output_layer.sequence_parallel)

        def score(hidden_states: Tensor, targets: Tensor) -> Tensor:
            with _without_sequence_parallel(output_layer):
                logits, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=False)
            return self._score(scale_logits(logits), targets)

        positions = max(self.chunk_size // targets.shape[1], 1)
        chunks = list(zip(hidden_states.split(positions), targets.split(positions), strict=True))
        if len(chunks) == 1:
            scored = score(*chunks[0])
        else:
            parts = [checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
            scored = torch.cat(parts, dim=2)
        return scored if context.part is None else self._put_together(scored, context.part, context.targets.shape)

    def _put_together(self, scored: Tensor, part: RowPart, shape: torch.Size) -> Tensor:
        """What each context-parallel rank has scored, [2, 1, n] -> [2, b, R], 0 in the padding, the same on all.

        The gradient goes to the rank that scored a token, whole: all ranks have the same loss, of which Megatron gives
        the model the mean over them, times their number.
        """
        flat = scored.new_zeros(2, shape.numel() + 1).index_copy(1, part.predicted, scored[:, 0])
        return reduce_from_tensor_model_parallel_region(flat[:, :-1].unflatten(1, shape), group=self.cp_group)

    def _predicting(self, hidden_states: Tensor, index: Tensor, *, split: bool) -> Tensor:
        """The hidden states at `index` [R, b] of the flattened [s, b]: [R, b, h], the same on all ranks of the group.

        hidden_states: [s, b, h], or, `split`, this rank's part of them [s / tp, b, h], which alone is then given a
        gradient, as it came: the output layer has summed it over the ranks.
        """
        hidden_states = hidden_states.flatten(0, 1)  # [s b, h]
        if not split:
            return hidden_states[index]
        index = index - self.tp_group.rank() * len(hidden_states)
        here = (index >= 0) & (index < len(hidden_states))
        found = hidden_states[index.clamp(0, len(hidden_states) - 1)]
        found = torch.where(here.unsqueeze(-1), found, torch.zeros_like(found))
        return reduce_from_tensor_model_parallel_region(found, group=self.tp_group)

    def _score(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits [r, b, V / tp] and targets [r, b] -> log-probs and entropies, fp32 [2, b, r]."""
        logits = logits.float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logits = self._without_padded_entries(logits)
        entropy = vocab_parallel_entropy(logits, tp_group=self.tp_group)
        loss = vocab_parallel_cross_entropy(logits, targets, tp_group=self.tp_group)
        return torch.stack([-loss.t(), entropy.t()])

    def _without_padded_entries(self, logits: Tensor) -> Tensor:
        entries = logits.shape[-1]
        first, last = VocabUtility.vocab_range_from_per_partition_vocab_size(
            entries, self.tp_group.rank(), self.tp_group.size()
        )
        if last <= self.vocab_size:
            return logits
        padded = torch.arange(first, last, device=logits.device) >= self.vocab_size
        return logits.masked_fill(padded, torch.finfo(logits.dtype).min)


@contextmanager
def _without_sequence_parallel(output_layer: Any) -> Iterator[None]:
    """It is given whole hidden states, which it must not gather, and sums their gradient over the ranks."""
    before, output_layer.sequence_parallel = output_layer.sequence_parallel, False
    try:
        yield
    finally:
        output_layer.sequence_parallel = before


def _packed_seq_params(batch: MicroBatch, cp_group: ProcessGroup | None) -> PackedSeqParams | None:
    if batch.shared is not None:
        share = None if cp_group is None or batch.part is None else RowShare([0, batch.tokens.shape[1]], cp_group)
        return PlannedSeqParams(batch.shared.plan, device=batch.tokens.device, share=share)
    if batch.cu_seqlens is None:
        return None
    longest = int(batch.cu_seqlens.diff().max())
    padded = None if batch.part is None else batch.cu_seqlens  # Transformer Engine's context parallelism asks for it
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@torch.no_grad()
def vocab_parallel_entropy(logits: Tensor, *, tp_group: ProcessGroup) -> Tensor:
    """Entropy in nats of softmax(logits), [..., V / tp] fp32 shards in, [...] out, no gradient."""
    largest = logits.max(-1).values
    torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=tp_group)
    shifted = logits - largest.unsqueeze(-1)
    weights = shifted.exp()
    sums = torch.stack([weights.sum(-1), (weights * shifted).sum(-1)])
    torch.distributed.all_reduce(sums, group=tp_group)
    return sums[0].log() - sums[1] / sums[0]


@torch.no_grad()
def score_responses(
    model: Sequence[nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    scorer: ResponseScorer,
    seq_length: int,
    micro_batch_size: int,
    pg_collection: ProcessGroupCollection,
) -> list[Tensor]:
    """Log-probs [b, R], fp32, of each micro-batch, in `eval()` and without gradients.

    The same result stands on all tensor- and pipeline-parallel ranks. seq_length and
    micro_batch_size are Megatron's: shapes between pipeline stages.
    """
    count = len(micro_batches)
    if len(model) > 1:  # the last one over again: the interleaved schedule takes micro-batches in groups
        group = get_model_config(model[0]).microbatch_group_size_per_vp_stage
        micro_batches = [*micro_batches, *[micro_batches[-1]] * (-count % group)]

    def forward_step(batches: Any, chunk: GPTModel) -> tuple[Tensor, Callable[..., Tensor]]:
        output = scorer.forward(chunk, next(batches).cuda())
        return output, lambda output_tensor, non_loss_data: output_tensor[0]

    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in model],
        model=list(model),
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    for chunk, training in zip(model, was_training, strict=True):
        chunk.train(training)
    return _from_last_stage(outputs[:count], micro_batches[:count], pp_group=pg_collection.pp)


def _from_last_stage(
    outputs: list[Tensor], micro_batches: Sequence[MicroBatch], *, pp_group: ProcessGroup
) -> list[Tensor]:
    if pp_group.size() == 1:
        return outputs
    source = torch.distributed.get_process_group_ranks(pp_group)[-1]
    if torch.distributed.get_rank() != source:
        outputs = [torch.empty(batch.targets.shape).cuda() for batch in micro_batches]
    outputs = [output.contiguous() for output in outputs]
    for output in outputs:
        torch.distributed.broadcast(output, src=source, group=pp_group)
    return outputs


class TrainerLogProbs:
    """Log-probs of rollout batches by the trainer's own forward, the same on all ranks."""

    def __init__(
        self,
        model: Sequence[nn.Module],
        scorer: ResponseScorer,
        layout: BatchLayout,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self._model, self._scorer, self._layout, self._pgs = model, scorer, layout, pg_collection

    def of_batch(self, batch: RolloutBatch) -> Tensor:
        """fp32 [n, R] of all responses.

        The forward runs on the micro-batches of the first epoch, so the first update sees ratios of
        exactly 1 wherever training forwards are deterministic.
        """
        return self.of_steps(batch, self._first_epoch(batch))

    def before_updates(self, batch: RolloutBatch, *, first_too: bool) -> Tensor:
        """fp32 [n, R] as the model is before the first optimizer step on a batch.

        NaN for the responses of that step, whose training forward says them, unless `first_too` needs them before, or
        training forwards draw numbers that this one does not.
        """
        first, *later = self._first_epoch(batch)
        if first_too or self._training_forwards_draw:
            return self.of_steps(batch, [first, *later])
        log_probs = self.of_steps(batch, later) if later else torch.zeros_like(batch.rollout_log_probs)
        log_probs[list(first.rows)] = torch.nan
        return log_probs

    @property
    def _training_forwards_draw(self) -> bool:
        config = get_model_config(self._model[0])
        return any((config.hidden_dropout, config.attention_dropout, config.moe_input_jitter_eps))

    def _first_epoch(self, batch: RolloutBatch) -> list[StepPlan]:
        return self._layout.plan(batch, replace(self._layout.new_use(), epochs=1))

    def of_steps(self, batch: RolloutBatch, steps: Sequence[StepPlan]) -> Tensor:
        """fp32 [n, R] of the responses in these optimizer steps, 0 for the others and in the padding."""
        micro_batches = [self._layout.micro_batch(batch, plan) for step in steps for plan in step.micro_batches]
        scored = score_responses(
            self._model,
            micro_batches,
            scorer=self._scorer,
            seq_length=self._layout.config.seq_length,
            micro_batch_size=self._layout.micro_batch_size,
            pg_collection=self._pgs,
        )
        return self._of_all_replicas(batch, micro_batches, scored)

    def of_training(
        self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch], log_probs: Sequence[Tensor]
    ) -> Tensor:
        """The same of a training forward; log_probs: [b, R] of each micro-batch, on the last pipeline stage."""
        scored = _from_last_stage([part.float() for part in log_probs], micro_batches, pp_group=self._pgs.pp)
        return self._of_all_replicas(batch, micro_batches, scored)

    def _of_all_replicas(
        self, batch: RolloutBatch, micro_batches: Sequence[MicroBatch], scored: Sequence[Tensor]
    ) -> Tensor:
        log_probs = torch.zeros_like(batch.rollout_log_probs).cuda()
        for micro_batch, rows in zip(micro_batches, scored, strict=True):
            mask = micro_batch.response_mask.cuda()
            log_probs[list(micro_batch.rows), : rows.shape[1]] = rows.masked_fill(~mask, 0.0)
        torch.distributed.all_reduce(log_probs, group=self._pgs.dp)  # each row on one replica
        return log_probs.cpu()
