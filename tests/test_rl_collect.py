"""A rollout batch, with real models and engines: what dynamic sampling throws out, what is added to rewards."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.rl.data.environment import Score, Task
from tests import ranks
from tests.ranks import Layout

EOD, GROUP, PROMPTS = 5, 4, 3


class Arithmetic:
    """Tasks of random tokens; a response is right if it has an even number of words that `right` likes."""

    heldout_lengths: tuple[int, ...] = ()

    def __init__(self, right: Callable[[str], bool]) -> None:
        self.right = right

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        def prompt(index: int) -> tuple[int, ...]:
            generator = torch.Generator().manual_seed(1000 * step + index)
            return tuple(torch.randint(6, 64, (8,), generator=generator).tolist())

        return [Task(prompt(i), "arithmetic", i) for i in range(first, first + count)]

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        return []

    def score(self, task: Task, response: str) -> Score:
        return Score(float(self.right(response)), self.right(response))


def starts_low(response: str) -> bool:
    return int((response.split() or ["0"])[0]) < 20


RIGHT: dict[str, Callable[[str], bool]] = {"starts low": starts_low, "never": lambda response: False}


def collect(right: str, **settings: Any) -> dict[str, Any]:
    """One rollout step of a tiny model, all of its answers written."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.generation.static import StaticRolloutEngine
    from megatron_longact.reporting.run_log import ROLLOUTS, RunLog
    from megatron_longact.rl.answers import AnswerLog
    from megatron_longact.rl.batches.micro_batches import BatchLayout
    from megatron_longact.rl.collect import Collector
    from megatron_longact.rl.config import AnswerFlags
    from megatron_longact.rl.heldout import Judge
    from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
    from tests.models import ModelSpec, build
    from tests.test_rl_objective import grpo_config

    config = grpo_config(
        **{
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "global_batch_size": PROMPTS * GROUP,
            "micro_batch_size": 2,
            **settings,
        }
    )
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    built = build(ModelSpec(layers=2))
    scorer = ResponseScorer(temperature=1.0, vocab_size=64, tp_group=pgs.tp)
    layout = BatchLayout.of_rank(config, pgs, pad_token=EOD, multiple_of=16)
    trainer_log_probs = TrainerLogProbs(built.chunks, scorer, layout, pg_collection=pgs)
    folder = Path(tempfile.mkdtemp())
    log = RunLog(folder, sys.stdout, None, total=9, done=0, evaluated=-1)

    def detokenize(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    collector = Collector(
        config,
        engine=StaticRolloutEngine(
            built.chunks[0].module,
            eod=EOD,
            vocab_size=64,
            max_batch_size=64,
            dp_group=parallel_state.get_data_parallel_group(),
        ),
        judge=Judge(Arithmetic(RIGHT[right]), detokenize),
        trainer_log_probs=trainer_log_probs,
        reference=None,
        answers=AnswerLog(AnswerFlags(rollouts="all"), log, detokenize=detokenize, iteration=lambda: 6),
    )
    try:
        batch, error = collector.rollouts(3), ""
    except ValueError as refused:
        batch, error = None, str(refused)
    log.close()
    answers = [json.loads(line) for line in (folder / ROLLOUTS).read_text().splitlines()]
    shutil.rmtree(folder)
    if batch is None:
        return {"error": error, "answers": answers}
    collector.add_log_probs(batch)
    first, *_ = layout.plan(batch)
    every = trainer_log_probs.of_batch(batch)
    old = batch.old_log_probs.isnan() | torch.isin(torch.arange(len(batch)), torch.tensor(first.rows))[:, None]
    begun = {"old_log_probs": torch.where(old, torch.nan, every), "ref_log_probs": every}
    begun |= {"importance_weights": None if config.corrects_rollouts else every}
    collector.complete(resumed := replace(batch, **begun))
    return {"batch": batch, "first": sorted(first.rows), "all": every, "answers": answers, "resumed": resumed}


def test_dynamic_sampling_keeps_groups_whose_rewards_differ() -> None:
    plain = ranks.run(collect, right="starts low")[0]["batch"]
    rewards = plain.rewards.view(PROMPTS, GROUP)
    assert [prompt for prompt in plain.prompts[::GROUP]] == [
        task.prompt for task in Arithmetic(starts_low).training_tasks(3, count=PROMPTS)
    ]
    spread = rewards.amax(1) != rewards.amin(1)
    assert plain.counts == {
        "groups_sampled": PROMPTS,
        "groups_without_spread": int((~spread).sum()),
        "groups_thrown_out": 0,
    }
    [got] = ranks.run(collect, right="starts low", dynamic_sampling=True, max_sampling_rounds=20)
    result = got["batch"]
    kept = result.rewards.view(PROMPTS, GROUP)
    assert (kept.amax(1) != kept.amin(1)).all()
    assert result.counts["groups_sampled"] > PROMPTS
    assert result.counts["groups_thrown_out"] == result.counts["groups_sampled"] - PROMPTS
    order = [
        task.prompt for task in Arithmetic(starts_low).training_tasks(3, count=int(result.counts["groups_sampled"]))
    ]
    places = [order.index(prompt) for prompt in result.prompts[::GROUP]]
    assert places == sorted(places)
    used = [answer for answer in got["answers"] if answer["used"]]  # what was thrown out is written as well
    assert len(got["answers"]) == result.counts["groups_sampled"] * GROUP
    assert [(a["prompt"], a["sample"]) for a in used] == [(place, j) for place in places for j in range(GROUP)]
    assert [a["reward"] for a in used] == result.rewards.tolist()
    for answer, tokens, length, finished in zip(used, result.responses, result.lengths, result.finished, strict=True):
        assert answer["response"] == " ".join(map(str, tokens[: length - finished.long()].tolist()))
        assert (answer["response_tokens"], answer["ended"]) == (length, "eod" if finished else "length")
    assert {a["iteration"] for a in used} == {7}  # the optimizer step that trains on them first
    # what both kept is the same to the token: a response does not depend on what else was sampled
    for index in spread.nonzero().flatten().tolist():
        rows = slice(index * GROUP, (index + 1) * GROUP)
        again = result.prompts.index(plain.prompts[index * GROUP])
        assert torch.equal(plain.responses[rows], result.responses[again : again + GROUP])
        assert torch.equal(plain.advantages[rows], result.advantages[again : again + GROUP])


def test_dynamic_sampling_ends_with_one_line() -> None:
    [got] = ranks.run(collect, right="never", dynamic_sampling=True, max_sampling_rounds=3)
    said = got["error"]
    assert "of 9 groups sampled in rollout step 3 only 0 had rewards that differ" in said
    assert "--max-sampling-rounds" in said
    assert "\n" not in said
    assert [answer["used"] for answer in got["answers"]] == [False] * 9 * GROUP  # there to be looked at


def test_long_responses_lose_reward() -> None:
    plain = ranks.run(collect, right="starts low")[0]["batch"]
    soft = {"overlong_buffer_length": 4, "overlong_penalty_factor": 2.0}
    punished = ranks.run(collect, right="starts low", **soft)[0]["batch"]
    assert torch.equal(plain.responses, punished.responses)
    loss = (plain.lengths - 2).clamp(min=0) / 4 * 2.0  # of six response tokens the last four
    assert loss.max() > 0
    torch.testing.assert_close(punished.rewards, plain.rewards - loss)


@pytest.mark.parametrize(
    ("settings", "before"),
    [
        ({"global_batch_size": 6}, False),
        ({}, False),
        ({"global_batch_size": 6, "policy_loss": "kl-cov"}, True),
        ({"corrects_rollouts": True}, True),
    ],
    ids=str,
)
def test_the_first_step_says_its_own_old_log_probs(settings: dict[str, Any], before: bool) -> None:
    """Those of later steps are known before it; all are where a selection or a correction rests on them."""
    result = ranks.run(collect, right="starts low", **settings)[0]
    known = ~result["batch"].old_log_probs.isnan().any(1)
    first = torch.zeros(len(known), dtype=torch.bool)
    first[result["first"]] = True
    assert torch.equal(known, torch.ones_like(first) if before else ~first)
    torch.testing.assert_close(result["batch"].old_log_probs[known], result["all"][known], rtol=0, atol=0)
    # begun with flags that need none of it, saved before its first step, and gone on with under these
    assert result["resumed"].ref_log_probs is None
    for name in ("old_log_probs", "importance_weights"):
        of_resumed, wanted = (getattr(result[which], name) for which in ("resumed", "batch"))
        torch.testing.assert_close(of_resumed, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_near_one_where_engine_and_trainer_agree(level: str) -> None:
    level_of = {"corrects_rollouts": True, "importance_sampling_level": level}
    batch = ranks.run(collect, right="starts low", **level_of, layout=Layout(tp=2), world_size=2)[0]["batch"]
    weights, mask = batch.importance_weights, batch.response_mask
    assert (weights[~mask] == 0).all()
    assert ((weights[mask] - 1).abs() < 1e-3).all()
    assert weights[mask].unique().numel() > 1
