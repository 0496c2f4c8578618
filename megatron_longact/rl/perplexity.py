"""Perplexity of a text under a Megatron model, window by window, by the trainer's own forward.

Shape letters: s tokens of a window, R = s - 1 predicted ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_longact.rl.batches.micro_batches import MicroBatch
from megatron_longact.rl.batches.packing import round_up
from megatron_longact.rl.log_probs import ResponseScorer, score_responses


def perplexity(
    model: Sequence[nn.Module],
    windows: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    pgs: ProcessGroupCollection,
) -> float:
    """The exponential of the mean negative log-likelihood, in nats, of all tokens but each window's first.

    All windows have one length. Every replica scores all of them; the same number on all ranks.
    """
    length = padded_length(len(windows[0]), pgs)
    scorer = ResponseScorer(temperature=1.0, vocab_size=vocab_size, tp_group=pgs.tp, cp_group=pgs.cp)
    whole = [_micro_batch(i, window, length=length) for i, window in enumerate(windows)]
    scored = score_responses(
        model,
        [batch.shared_by(pgs.cp.size(), cp_rank=pgs.cp.rank()) for batch in whole],
        scorer=scorer,
        seq_length=length,
        micro_batch_size=1,
        pg_collection=pgs,
    )
    mean = float(torch.cat(scored).double().mean())
    return math.exp(-mean) if mean > -700 else math.inf


def padded_length(length: int, pgs: ProcessGroupCollection) -> int:
    """What a window of so many tokens is padded to: sequence and context parallelism cut it into equal parts."""
    return round_up(length, pgs.tp.size() * (2 * pgs.cp.size() if pgs.cp.size() > 1 else 1))


def _micro_batch(row: int, window: Sequence[int], *, length: int) -> MicroBatch:
    """A window, padded to `length`, as a row whose response is everything behind its first token."""
    own = torch.tensor([list(window)])  # [1, s]
    predicted = torch.arange(own.shape[1] - 1).unsqueeze(0)  # [1, R]
    tokens = torch.nn.functional.pad(own, (0, length - own.shape[1]))
    everything = torch.arange(length).unsqueeze(0) < own.shape[1]
    return MicroBatch(
        rows=(row,),
        tokens=tokens,
        position_ids=torch.arange(length).clamp(max=own.shape[1] - 1).unsqueeze(0),
        token_mask=everything,
        positions=predicted,
        cu_seqlens=None,
        targets=own[:, 1:].contiguous(),
        response_mask=torch.ones_like(predicted, dtype=torch.bool),
        advantages=torch.zeros(1),
        old_log_probs=None,
        ref_log_probs=None,
        importance_weights=None,
        selected=None,
    )
