"""Prompts computed once: rows and their plans, and a whole optimizer step that is the one without sharing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.megatron.attention_plan import Piece
from megatron_longact.rl.batches.segments import shared_row
from megatron_longact.rl.objectives.policy_losses import POLICY_LOSSES
from megatron_longact.tokens import TokenRules
from tests import ranks
from tests.ranks import Layout
from tests.test_rl_objective import EOD, RELATIVE, SEQ_LENGTH, grpo_config, make_batch

A, B = (7, 8, 9), (4, 5)


def test_a_row_knows_its_segments() -> None:
    row = shared_row([A, A, B, A], [2, 1, 3, 1], num_tokens=18)
    assert [group.prompt for group in row.groups] == [(0, 3), (6, 8), (11, 14)]  # neighbours share
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert row.predicting(3).tolist() == [[2, 3, 4], [2, 5, 6], [7, 8, 9], [13, 14, 15]]
    assert row.plan.pieces == (
        Piece((0, 3), ((0, 3),)),
        Piece((3, 5), ((0, 3), (3, 5))),
        Piece((5, 6), ((0, 3), (5, 6))),
        Piece((6, 11), ((6, 11),)),  # alone with its prompt: an ordinary sequence
        Piece((11, 15), ((11, 15),)),
        Piece((15, 18), ((15, 18),)),
    )


@pytest.mark.parametrize("rules", [TokenRules(), TokenRules(min_context=5), TokenRules(skip_first_tokens=4)], ids=str)
def test_tokens_weigh_what_they_would_apart(rules: TokenRules) -> None:
    prompts, lengths = [A, A, A, B], [2, 1, 4, 3]
    row = shared_row(prompts, lengths, num_tokens=20)
    tokens = torch.tensor([*A, 20, 21, 30, 40, 41, 42, 43, *B, 50, 51, 52])
    sequences = [[*A, 20, 21], [*A, 30], [*A, 40, 41, 42, 43], [*B, 50, 51, 52]]
    weights = row.weights(rules)[0]
    assert not weights[len(tokens) :].any()
    for token in tokens.unique().tolist():
        wanted = sum(
            token in sequence[rules.skip_first_tokens :] and len(sequence) >= rules.min_context
            for sequence in sequences
        )
        assert weights[: len(tokens)][tokens == token].sum() == wanted, token


RULES: dict[str, dict[str, Any]] = {
    "cispo": {"min_context": 14},
    "clip-cov": {"skip_first_tokens": 10, "statistic": "rms"},
    "dapo": {},
    "grpo": {},
    "gspo": {"statistic": "max-abs"},
    "kl-cov": {"min_context": 14, "skip_first_tokens": 3},
}
"""LongAct's settings beside each loss: its statistics, and what a token must fulfil."""

OWN = "dapo"
"""The loss for which old log-probs are those of the training forward, where prompts are shared."""


def step(policy_loss: str, share: bool) -> dict[str, Any]:
    """One optimizer step of a model with LongAct: old log-probs, metrics, saliency, masks, and the weights after it."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
    from megatron_longact.rl.objectives.objective import Objective
    from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig
    from megatron_longact.rl.objectives.token_selection import TokenSelector
    from tests.models import ModelSpec, build, full_weights

    pgs = ProcessGroupCollection.use_mpu_process_groups()
    config = grpo_config(
        policy_loss=policy_loss,
        micro_batch_size=2,
        shared_prompts=share,
        kl_beta=0.1,
        loss=PolicyLossConfig(kl_cov_ratio=0.2, clip_cov_ratio=0.2, clip_cov_lower=-10.0),
    )
    yarn = policy_loss == "dapo"  # its table of RoPE comes with a factor
    built = build(ModelSpec(layers=2, yarn=yarn))
    longact = LongAct.attach(built.chunks, built.optimizer, LongActConfig(**RULES[policy_loss]))
    layout = BatchLayout.of_rank(config, pgs, pad_token=EOD, multiple_of=16)
    scorer = ResponseScorer(temperature=1.0, vocab_size=64, tp_group=pgs.tp, cp_group=pgs.cp)
    trainer_log_probs = TrainerLogProbs(built.chunks, scorer, layout, pg_collection=pgs)
    batch = make_batch()
    old = trainer_log_probs.of_batch(batch)
    known = old + 0.1 * torch.sin(torch.arange(old.numel()).view_as(old) * 1.0)
    if policy_loss == OWN:
        known = torch.full_like(old, torch.nan) if share else old
    batch = replace(batch, old_log_probs=known)
    [plan] = layout.plan(batch)
    micro_batches = [layout.micro_batch(batch, part) for part in plan.micro_batches]
    selected = TokenSelector(config, trainer_log_probs).select(batch, plan, update=1)
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    objective = Objective(config, scorer, longact, dp_size=pgs.dp.size())
    reports = get_forward_backward_func()(
        forward_step_func=objective.forward_step(batch.response_mask, num_microbatches=len(plan.micro_batches)),
        data_iterator=iter([layout.micro_batch(batch, part, selected=selected) for part in plan.micro_batches]),
        model=built.chunks[0],
        num_microbatches=len(plan.micro_batches),
        seq_length=SEQ_LENGTH,
        micro_batch_size=layout.micro_batch_size,
        forward_only=False,
    )
    built.optimizer.step()
    sums = {name: torch.stack([report[name] for report in reports]).sum(0) for name in (reports[0] if reports else ())}
    for total in sums.values():
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    assert "few named" not in longact._said
    own = [objective.own_log_probs[part.rows] for part in micro_batches if objective.own_log_probs]
    said = policy_loss == OWN and share
    return {
        "trained": trainer_log_probs.of_training(batch, micro_batches, own) if said else old,
        "old": old,
        "metrics": {name: float(total[0] / total[1]) for name, total in sums.items()},
        "selected": selected,
        "saliency": longact.saliency,
        "masks": longact.masks,
        "weights": full_weights(built),
        "tokens": plan.tokens,
    }


def both() -> dict[str, list[dict[str, Any]]]:
    assert RULES.keys() == POLICY_LOSSES.keys()
    return {name: [step(name, share) for share in (False, True)] for name in RULES}


def close(mine: Tensor, theirs: Tensor, what: Any) -> None:
    """To `RELATIVE` of the largest value: fp32, and sums over tokens in another order."""
    assert (mine - theirs).abs().max() <= RELATIVE * theirs.abs().max(), what


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 1), (Layout(tp=2), 2), (Layout(pp=2), 2), (Layout(), 2), (Layout(cp=2), 2)],
    ids=["one rank", "tp2", "pp2", "dp2", "cp2"],
)
def test_a_step_is_the_one_without_sharing(layout: Layout, world_size: int) -> None:
    for result in ranks.run(both, layout=layout, world_size=world_size):
        for name, (apart, shared) in result.items():
            assert shared["tokens"] < apart["tokens"]
            close(shared["old"], apart["old"], name)
            close(shared["trained"], apart["old"], name)
            assert shared["metrics"] == pytest.approx(apart["metrics"], rel=1e-4), name
            assert apart["selected"] is None or torch.equal(shared["selected"], apart["selected"]), name
            for layer, parts in apart["saliency"].items():
                for part, scores in parts.items():
                    close(shared["saliency"][layer][part], scores, (name, layer, part))
                    assert torch.equal(shared["masks"][layer][part], apart["masks"][layer][part]), (name, layer, part)
            for parameter, weight in apart["weights"].items():
                close(shared["weights"][parameter], weight, (name, parameter))
