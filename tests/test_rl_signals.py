"""A rollout batch that teaches nothing is said, and a run of them warned of."""

import torch

from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.signals import SignalWatch, missing


def batch(rewards: list[float], *, step: int = 0, finished: bool = True, flat_groups: int = 0) -> RolloutBatch:
    n = len(rewards)
    return RolloutBatch(
        step=step,
        prompts=[(1,)] * n,
        responses=torch.ones(n, 2, dtype=torch.int64),
        lengths=torch.full((n,), 2),
        rollout_log_probs=torch.zeros(n, 2),
        rewards=torch.tensor(rewards),
        correct=torch.zeros(n, dtype=torch.bool),
        finished=torch.tensor([finished] + [False] * (n - 1)),
        advantages=torch.zeros(n),
        counts={"groups_sampled": 2, "groups_without_spread": flat_groups},
    )


def test_what_is_missing_has_a_word() -> None:
    assert missing(batch([0.0, 1.0, 0.0, 0.0], flat_groups=1)) == []
    assert missing(batch([0.1] * 4, flat_groups=2)) == ["constant-reward"]
    assert missing(batch([0.0, 0.0, 1.0, 1.0], flat_groups=2)) == ["no-spread"]
    assert missing(batch([0.0, 1.0, 0.0, 1.0], finished=False)) == ["all-truncated"]


def test_a_few_in_a_row_are_warned_of_once() -> None:
    watch = SignalWatch()
    said = [watch.see(batch([0.0] * 4, step=step, finished=False)) for step in (0, 0, 0, 1, 2, 3, 4)]
    assert [i for i, line in enumerate(said) if line] == [4]
    assert "3 rollout steps in a row" in str(said[4])
    assert "constant-reward: " in str(said[4])
    assert "--max-response-length" in str(said[4])
    other = SignalWatch()
    assert not any(other.see(batch([0.0, float(step % 3 == 2)], step=step)) for step in range(9))
