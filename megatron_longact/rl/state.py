"""What the outer loop must remember between optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron.training import training

from megatron_longact.checkpointing import Stateful, carry_state
from megatron_longact.rl.batches.rollout_batch import RolloutBatch


@dataclass
class LoopState:
    """Counters, the rollout batch in use, and the held-out results so far; the same on all ranks.

    Sampling and task drawing are functions of (seed, rollout step), so there is no generator here.
    """

    rollout_steps: int = 0
    """Rollout batches made."""

    updates_done: int = 0
    """Optimizer steps taken on `batch`."""

    batch: RolloutBatch | None = None
    """None when the next step begins with new rollouts."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """One row for each evaluation, first to last."""

    def state_dict(self) -> dict[str, Any]:
        """A plain dict of numbers and CPU tensors."""
        return {
            "rollout_steps": self.rollout_steps,
            "updates_done": self.updates_done,
            "batch": None if self.batch is None else self.batch.state_dict(),
            "evaluations": self.evaluations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        batch = state_dict["batch"]
        self.rollout_steps = state_dict["rollout_steps"]
        self.updates_done = state_dict["updates_done"]
        self.batch = None if batch is None else RolloutBatch.from_state_dict(batch)
        self.evaluations = list(state_dict["evaluations"])


@contextmanager
def carried_in_checkpoints(name: str, stateful: Stateful) -> Iterator[None]:
    """While this is open, a scheduler that Megatron makes carries the state in its checkpoints.

    Open it around `setup_model_and_optimizer`, which makes the scheduler and then loads.
    """
    original = training.get_optimizer_param_scheduler

    def get_optimizer_param_scheduler(*args: Any, **kwargs: Any) -> Any:
        scheduler = original(*args, **kwargs)
        carry_state(scheduler, name, stateful)
        return scheduler

    training.get_optimizer_param_scheduler = get_optimizer_param_scheduler
    try:
        yield
    finally:
        training.get_optimizer_param_scheduler = original
