"""Whether a rollout batch has anything to teach: a word for the console when not, and a warning when that goes on."""

from __future__ import annotations

from megatron_longact.rl.batches.rollout_batch import RolloutBatch

PATIENCE = 3
"""Rollout steps without signal, one after the other, before the warning."""

_REASONS = {
    "constant-reward": "all rewards are the same: the tasks are much too hard or too easy for this model, or the "
    "reward does not read answers in the form in which the model gives them",
    "no-spread": "rewards do not differ within a group, so no advantage is left: tasks too hard or too easy, a low "
    "--rl-default-temperature, or a small --grpo-group-size",
    "all-truncated": "no response comes to its end: --max-response-length is too short, or the tokenizer's end-of-text "
    "token is not the one that the model stops with",
}


def missing(batch: RolloutBatch) -> list[str]:
    """What leaves the batch without a signal, a word each; empty: it has one."""
    words = []
    if batch.rewards.amax() == batch.rewards.amin():
        words.append("constant-reward")
    elif batch.counts.get("groups_sampled") and batch.counts["groups_sampled"] == batch.counts["groups_without_spread"]:
        words.append("no-spread")
    if not batch.finished.any():
        words.append("all-truncated")
    return words


class SignalWatch:
    """Counts rollout steps without signal that follow each other; warns once a run."""

    def __init__(self) -> None:
        self.step: int | None = None
        """Of the batch seen last."""
        self._in_a_row = 0
        self._warned = False

    def see(self, batch: RolloutBatch) -> str | None:
        """Count a batch, once however often it is shown; the warning, when it is due."""
        if batch.step == self.step:
            return None
        self.step, words = batch.step, missing(batch)
        self._in_a_row = self._in_a_row + 1 if words else 0
        if self._in_a_row < PATIENCE or self._warned:
            return None
        self._warned = True
        reasons = "; ".join(f"{word}: {_REASONS[word]}" for word in words)
        return f"WARNING: {self._in_a_row} rollout steps in a row had nothing to teach. {reasons}"
