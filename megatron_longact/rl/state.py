"""What the outer loop must remember between optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron.training import training

from megatron_longact.megatron.checkpointing import Stateful, carry_state
from megatron_longact.rl.audit import RowHistory
from megatron_longact.rl.batches.micro_batches import BatchLayout
from megatron_longact.rl.batches.plans import Use
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.selection import QK


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

    use: Use | None = None
    """Of `batch`: a run that goes on with other flags finishes it in the order in which it was begun. None if there is
    none, and out of a checkpoint from before it was kept."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """One row for each evaluation, first to last."""

    rows: RowHistory | None = None
    """Of Q and K; None until it is kept, and out of a checkpoint from before it was."""

    def state_dict(self) -> dict[str, Any]:
        """A plain dict of numbers and CPU tensors."""
        return {
            "rollout_steps": self.rollout_steps,
            "updates_done": self.updates_done,
            "batch": None if self.batch is None else self.batch.state_dict(),
            "use": None if self.use is None else asdict(self.use),
            "evaluations": self.evaluations,
            "rows": None if self.rows is None else _plain(self.rows),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        batch = state_dict["batch"]
        self.rollout_steps = state_dict["rollout_steps"]
        self.updates_done = state_dict["updates_done"]
        self.batch = None if batch is None else RolloutBatch.from_state_dict(batch)
        use = state_dict.get("use")
        self.use = None if use is None else Use(**use)
        self.evaluations = list(state_dict["evaluations"])
        rows = state_dict.get("rows")
        self.rows = None if rows is None else RowHistory(rows["since"], QK(**rows["active"]), QK(**rows["moved"]))

    def take_up(self, layout: BatchLayout) -> None:
        """Before the first step: raise `ValueError` for a batch out of a checkpoint that these flags cannot finish."""
        if self.batch is None:
            return
        size = layout.config.global_batch_size
        if self.use is None:  # as if begun with these flags
            self.use = replace(layout.new_use(), done=self.updates_done * size)
        first = next(iter(layout.plan(self.batch, self.use)), None)
        if first is None:
            raise ValueError(
                f"the checkpoint is of the middle of a rollout batch of {len(self.batch)} responses, after "
                f"{self.updates_done} optimizer steps, and --global-batch-size {size} leaves no more of it: give the "
                "number that it was begun with"
            )
        unknown = {row for row in range(len(self.batch)) if not self.batch.knows_old_log_probs([row])}
        if not unknown <= {*first.rows}:
            raise ValueError(
                f"the checkpoint is of the middle of an optimizer step on {len(unknown)} responses, whose old "
                f"log-probs its forward says, and --global-batch-size {size} would train some of them later: "
                f"give {len(unknown)}"
            )


def _plain(rows: RowHistory) -> dict[str, Any]:
    return {"since": rows.since, "active": rows.active._asdict(), "moved": rows.moved._asdict()}


@contextmanager
def before_each_save(action: Callable[[], None]) -> Iterator[None]:
    """While this is open, Megatron's saves are preceded by an action, on all ranks, so that it may be collective."""
    original = training.save_checkpoint_and_time

    def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    training.save_checkpoint_and_time = save_checkpoint_and_time
    try:
        yield
    finally:
        training.save_checkpoint_and_time = original


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
