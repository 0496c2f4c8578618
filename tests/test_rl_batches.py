"""From rollouts to micro-batches: every response trained once an epoch, nothing lost in the padding."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from megatron_longact.rl.batches.micro_batches import BatchLayout, make_micro_batch
from megatron_longact.rl.batches.plans import MicroBatchPlan, Packing, StepPlan, plan_steps
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.state import LoopState

PAD = 99


@pytest.fixture
def batch() -> RolloutBatch:
    generator = torch.Generator().manual_seed(0)
    n, r = 16, 6
    lengths = torch.randint(1, r + 1, (n,), generator=generator)
    return RolloutBatch(
        step=3,
        prompts=[tuple(range(10 * (i % 3) + 5)) for i in range(n)],
        responses=torch.randint(50, 90, (n, r), generator=generator),
        lengths=lengths,
        rollout_log_probs=-torch.rand(n, r, generator=generator),
        rewards=torch.rand(n, generator=generator),
        correct=torch.rand(n, generator=generator) > 0.5,
        finished=torch.ones(n, dtype=torch.bool),
        advantages=torch.randn(n, generator=generator),
        old_log_probs=-torch.rand(n, r, generator=generator),
    )


def plan(batch: RolloutBatch, *, dp_rank: int = 0, dp_size: int = 1, seed: int = 1, epochs: int = 2) -> list[StepPlan]:
    return plan_steps(
        batch,
        seed=seed,
        epochs=epochs,
        global_batch_size=8,
        micro_batch_size=2,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def test_each_epoch_has_each_response_once_in_its_own_order(batch: RolloutBatch) -> None:
    steps = plan(batch)
    assert len(steps) == 4
    epochs = [[row for step in steps[i : i + 2] for mb in step.micro_batches for row in mb.rows] for i in (0, 2)]
    assert [sorted(rows) for rows in epochs] == [list(range(16))] * 2
    assert {frozenset(steps[0].rows), frozenset(steps[1].rows)} != {frozenset(steps[2].rows), frozenset(steps[3].rows)}


def test_the_plan_is_a_function_of_seed_and_rollout_step(batch: RolloutBatch) -> None:
    assert plan(batch) == plan(batch)
    assert plan(batch) != plan(batch, seed=2)
    assert plan(batch) != plan(replace(batch, step=4))


def test_replicas_share_a_step_with_equal_shapes(batch: RolloutBatch) -> None:
    whole, parts = plan(batch), [plan(batch, dp_rank=r, dp_size=2) for r in (0, 1)]
    for step, first, second in zip(whole, *parts, strict=True):
        assert set(step.rows) == set(first.rows) == set(second.rows)
        own = [row for part in (first, second) for mb in part.micro_batches for row in mb.rows]
        assert sorted(own) == sorted(step.rows)
        longest = [[mb.longest for mb in part.micro_batches] for part in (first, second)]
        assert longest[0] == longest[1] == sorted(longest[0])


def test_a_micro_batch_holds_its_rows(batch: RolloutBatch) -> None:
    rows = (0, 4, 2)
    longest = max(batch.total_length(row) for row in rows)
    got = make_micro_batch(batch, MicroBatchPlan(rows, longest), pad_token=PAD, multiple_of=16)
    assert got.tokens.shape[1] % 16 == 0
    assert 0 <= got.tokens.shape[1] - longest < 16
    assert batch.old_log_probs is not None
    for i, row in enumerate(rows):
        length, response = int(batch.lengths[row]), batch.responses[row, : batch.lengths[row]]
        prompt = batch.prompts[row]
        assert got.tokens[i].tolist() == [*prompt, *response, *[PAD] * (got.tokens.shape[1] - len(prompt) - length)]
        assert got.token_mask[i].sum() == len(prompt) + length
        assert got.token_mask[i, : len(prompt) + length].all()
        mask = got.response_mask[i]
        assert mask.sum() == length
        assert torch.equal(got.targets[i][mask], response)
        # the hidden state at a position predicts the token behind it
        flat = got.tokens.t().flatten()  # [s * b], as the hidden states are read
        assert torch.equal(flat[got.positions[i][mask] + len(got.rows)], response)
        assert got.old_log_probs is not None
        assert torch.equal(got.old_log_probs[i][mask], batch.old_log_probs[row, :length])
        assert got.advantages[i] == batch.advantages[row]


def test_a_fixed_length_is_kept(batch: RolloutBatch) -> None:
    got = make_micro_batch(batch, MicroBatchPlan((0, 1), 20), pad_token=PAD, multiple_of=16, fixed_length=64)
    assert got.tokens.shape == (2, 64)
    assert int(got.positions.max()) < 64


def test_padding_asks_for_no_position_that_a_model_may_lack(batch: RolloutBatch) -> None:
    """A table of learned positions may end with the longest sequence."""
    rows = (0, 1)
    got = make_micro_batch(batch, MicroBatchPlan(rows, 20), pad_token=PAD, multiple_of=16, fixed_length=64)
    longest = max(batch.total_length(row) for row in rows)
    assert got.position_ids[:, :longest].tolist() == 2 * [list(range(longest))]
    assert got.position_ids.max() == longest - 1
    assert got.token_mask.sum(1).tolist() == [batch.total_length(row) for row in rows]


def test_state_dict_gives_the_batch_back(batch: RolloutBatch) -> None:
    state = batch.state_dict()
    back = RolloutBatch.from_state_dict(state)
    assert back.prompts == batch.prompts
    for name, value in vars(batch).items():
        other = getattr(back, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert all(isinstance(value, int | torch.Tensor | None) for name, value in state.items() if name != "counts")


def test_batches_are_cut_and_joined(batch: RolloutBatch) -> None:
    again = RolloutBatch.concatenate([batch.select([3, 4]), batch.select([0])])
    for row, source in enumerate([3, 4, 0]):
        assert again.prompts[row] == batch.prompts[source]
        for name in ("responses", "lengths", "rewards", "old_log_probs", "finished"):
            assert torch.equal(getattr(again, name)[row], getattr(batch, name)[source])
    assert again.ref_log_probs is None
    assert again.step == batch.step


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pp_size", [1, 2])
def test_padding_share_is_that_of_the_micro_batches(
    batch: RolloutBatch, pp_size: int, packed: bool, shared: bool
) -> None:
    config = Namespace(
        seed=1,
        epochs=1,
        global_batch_size=8,
        micro_batch_size=2,
        seq_length=48,
        pack_sequences=packed,
        shared_prompts=shared,
        max_sequences_per_row=4,
    )
    layout = BatchLayout(config, pad_token=PAD, multiple_of=4, dp_rank=0, dp_size=1, pp_size=pp_size)
    for step in layout.plan(batch):
        masks = [layout.micro_batch(batch, part).token_mask for part in step.micro_batches]
        wanted = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        assert layout.padding_share(step) == pytest.approx(wanted)


def test_selected_tokens_go_with_their_rows(batch: RolloutBatch) -> None:
    selected = torch.rand(batch.responses.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    micro_batch = make_micro_batch(
        batch, MicroBatchPlan(rows=(5, 2), longest=40), pad_token=PAD, multiple_of=4, selected=selected
    )
    assert micro_batch.selected is not None
    assert torch.equal(micro_batch.selected, selected[[5, 2], : micro_batch.targets.shape[1]])


def test_a_packed_micro_batch_holds_its_rows(batch: RolloutBatch) -> None:
    rows = (5, 2, 7)
    total = sum(batch.total_length(row) for row in rows)
    packing = Packing(capacity=200, max_sequences=3)
    plan = MicroBatchPlan(rows=rows, longest=total)
    got = make_micro_batch(batch, plan, pad_token=PAD, multiple_of=16, packing=packing)
    assert got.tokens.shape == (1, -(-total // 16) * 16)
    assert int(got.token_mask.sum()) == total
    assert got.cu_seqlens is not None
    for i, row in enumerate(rows):
        begin = int(got.cu_seqlens[i])
        sequence = batch.sequence(row)
        assert torch.equal(got.tokens[0, begin : begin + len(sequence)], sequence)
        assert got.position_ids[0, begin : begin + len(sequence)].tolist() == list(range(len(sequence)))
        response = batch.responses[row, : batch.lengths[row]]
        assert torch.equal(got.tokens[0, got.positions[i][got.response_mask[i]] + 1], response)


def layout_of(*, global_batch_size: int, micro_batch_size: int = 2, dp_size: int = 1, epochs: int = 1) -> BatchLayout:
    config = Namespace(
        seed=1,
        epochs=epochs,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        pack_sequences=False,
        shared_prompts=False,
    )
    return BatchLayout(config, pad_token=PAD, multiple_of=4, dp_rank=0, dp_size=dp_size, pp_size=1)


def after_steps(batch: RolloutBatch, count: int, *, layout: BatchLayout) -> tuple[LoopState, list[int]]:
    """The state after so many optimizer steps on a batch, and the rows that they trained on."""
    steps = layout.plan(batch)[:count]
    rows = [row for step in steps for row in step.rows]
    state = LoopState(rollout_steps=1, updates_done=count, batch=batch)
    state.use = replace(layout.new_use(), done=len(rows))
    return state, rows


@pytest.mark.parametrize(("begun_with", "steps", "now", "left"), [(8, 1, 4, [4, 4]), (4, 1, 8, [8, 4]), (4, 3, 8, [4])])
def test_a_half_used_batch_is_finished_with_another_batch_size(
    batch: RolloutBatch, begun_with: int, steps: int, now: int, left: list[int]
) -> None:
    saved, trained = after_steps(batch, steps, layout=layout_of(global_batch_size=begun_with))
    state, layout = LoopState(), layout_of(global_batch_size=now)
    state.load_state_dict(saved.state_dict())
    state.take_up(layout)
    assert state.batch is not None
    rest = layout.plan(state.batch, state.use)
    assert [len(step.rows) for step in rest] == left
    assert sorted(trained + [row for step in rest for row in step.rows]) == list(range(16))


def test_a_half_used_batch_keeps_its_order_and_its_epochs(batch: RolloutBatch) -> None:
    begun = layout_of(global_batch_size=8, epochs=2)
    state, _ = after_steps(batch, 1, layout=begun)
    other = replace(begun, config=Namespace(**{**vars(begun.config), "seed": 9, "epochs": 1}))
    assert other.plan(batch, state.use) == begun.plan(batch)[1:]


def test_what_cannot_be_finished_is_refused_with_both_numbers(batch: RolloutBatch) -> None:
    state, _ = after_steps(batch, 3, layout=layout_of(global_batch_size=4))
    with pytest.raises(ValueError, match=r"4 responses are left .* --micro-batch-size 2 x 4 replicas"):
        state.take_up(layout_of(global_batch_size=8, dp_size=4))


def test_a_checkpoint_of_before_goes_on_or_is_refused(batch: RolloutBatch) -> None:
    saved, _ = after_steps(batch, 3, layout=layout_of(global_batch_size=4))
    old = {name: value for name, value in saved.state_dict().items() if name != "use"}
    state = LoopState()
    state.load_state_dict(old)
    state.take_up(layout_of(global_batch_size=4))
    assert state.use == saved.use
    state.load_state_dict(old)
    with pytest.raises(ValueError, match="of 16 responses, after 3 optimizer steps, and --global-batch-size 8 leaves"):
        state.take_up(layout_of(global_batch_size=8))


def test_a_first_step_that_is_repeated_has_all_the_responses_whose_log_probs_it_says(batch: RolloutBatch) -> None:
    """A run that a wrong result has ended saves before the step has said them."""
    begun = layout_of(global_batch_size=8)
    state, _ = after_steps(batch, 0, layout=begun)
    assert batch.old_log_probs is not None
    batch.old_log_probs[list(begun.plan(batch)[0].rows)] = torch.nan
    state.take_up(begun)
    state.take_up(layout_of(global_batch_size=16))
    with pytest.raises(ValueError, match="--global-batch-size 4 would train some of them later: give 8"):
        state.take_up(layout_of(global_batch_size=4))
