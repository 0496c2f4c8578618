"""The outer RL loop: rollouts on all ranks between optimizer steps, and Megatron's own `train_step`.

    rollout step     tasks -> responses -> rewards -> advantages -> reference log-probs, and old ones if needed
    optimizer steps  several a rollout step: Megatron's `train_step` on micro-batches of it

An iteration is what Megatron means by it: one optimizer step. Rewards and times of a rollout step are
repeated in each of its iterations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_longact import metrics as longact_metrics
from megatron_longact.longact import LongAct
from megatron_longact.megatron import telemetry
from megatron_longact.reporting.run_log import MEGATRON_LOG, RunLog
from megatron_longact.rl.audit import RowAudit, RowCounts
from megatron_longact.rl.batches.plans import StepPlan
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.collect import Collector
from megatron_longact.rl.exports import Exports
from megatron_longact.rl.heldout import heldout_scalars
from megatron_longact.rl.signals import SignalWatch
from megatron_longact.rl.signals import missing as missing_signal
from megatron_longact.rl.state import LoopState, before_each_save
from megatron_longact.rl.trainer import MegatronTrainer, StepOutcome
from megatron_longact.rl.update import PolicyUpdate

TIME_SHARE = "longact/time_share"
"""Share of an optimizer step's wall time that LongAct took."""

TIMES = (longact_metrics.TIME, "step_time_s", "rollout_time_s", "log_prob_time_s", "selection_time_s")
"""Wall times in seconds, those of the slowest rank."""


class RLLoop:
    """A run from its first to its last iteration; every rank has one and calls the same methods."""

    def __init__(
        self,
        trainer: MegatronTrainer,
        *,
        state: LoopState,
        collector: Collector,
        update: PolicyUpdate,
        audit: RowAudit,
        log: RunLog,
    ) -> None:
        self.longact = LongAct.of(trainer.optimizer)
        self._trainer = trainer
        self._state = state
        self._collector = collector
        self._update = update
        self._audit = audit
        state.rows = audit.history
        self._log = log
        self._exports = Exports(trainer.args, say=log.say)
        self._signals = SignalWatch()
        self._times: dict[str, float | None] = dict.fromkeys(TIMES)

    def run(self) -> bool:
        """Train until `--train-iters`, or until Megatron says to exit; whether it came to the end."""
        self._state.take_up(self._update.layout)
        self._trainer.begin()
        self._complete()
        with before_each_save(self._before_save):
            exiting = self._train()
        self._trainer.finish()
        self._exports.wait()
        if self.verdict is not None:
            self._log.say(self.verdict)
        self._log.close()
        return not exiting

    def _complete(self) -> None:
        """A batch out of a checkpoint, which other flags can have begun."""
        if self._state.batch is not None:
            with self._trainer.between_steps():
                self._collector.complete(self._state.batch)

    def _before_save(self) -> None:
        self._exports.wait()
        self._audit.look()

    def _train(self) -> bool:
        trainer, args = self._trainer, self._trainer.args
        self._evaluate_if_due()
        exiting = False
        while trainer.iteration < args.train_iters and not exiting:
            exiting = self._iterate()
        if not exiting:
            if self._collector.has_heldout and self._last_evaluation != trainer.iteration:
                self._evaluate()
            self._save_and_export(bool(args.save))
        return exiting

    def count_rows(self) -> RowCounts:
        """Rows of Q and K that moved; collective."""
        return self._audit.count()

    @property
    def exit_code(self) -> int:
        """What Megatron wants the process to end with when the run ended early."""
        return self._trainer.exit_code

    @property
    def verdict(self) -> str | None:
        """Why a wrong result ended the run, in one line; None if none did."""
        found = self._trainer.verdict
        return None if found is None else f"{found.line}; see {self._trainer.args.run_dir}/{MEGATRON_LOG}"

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Held-out results, first to last."""
        return self._state.evaluations

    def _iterate(self) -> bool:
        """One optimizer step with all that belongs to it; whether to exit."""
        state, trainer, args = self._state, self._trainer, self._trainer.args
        if state.batch is None:
            self._collect()
        batch, use = state.batch, state.use
        assert batch is not None
        assert use is not None
        plan, *later = self._update.layout.plan(batch, use)
        selected = self._select(batch, plan)
        begun = time.perf_counter()
        outcome = self._update.step(batch, plan, selected=selected)
        self._times["step_time_s"] = time.perf_counter() - begun
        if outcome.should_exit:
            return True
        state.updates_done += 1
        state.use = replace(use, done=use.done + len(plan.rows))
        if not later:
            state.batch, state.use, state.updates_done = None, None, 0
        self._report(batch, plan, outcome, moved=self._audit.after_step())
        if not trainer.asked_to_stop():  # else the run that goes on evaluates, before anything else
            self._evaluate_if_due()
        exiting = trainer.save_or_exit()
        if not exiting and trainer.iteration < args.train_iters:
            first = args.save_first_iteration and trainer.iteration == 1
            self._save_and_export(first or self._exports.due(trainer.iteration))
        return exiting

    def _save_and_export(self, save: bool) -> None:
        """Save, unless Megatron has just done it, and give the checkpoint to an export that is due."""
        if save and not self._trainer.saved_now:
            self._trainer.save()
        if self._exports.due(self._trainer.iteration):
            self._exports.begin(self._trainer.iteration)

    def _collect(self) -> None:
        begun = time.perf_counter()
        with self._trainer.between_steps():
            batch = self._collector.rollouts(self._state.rollout_steps)
            made = time.perf_counter()
            self._collector.add_log_probs(batch)
        self._times["rollout_time_s"] = made - begun
        self._times["log_prob_time_s"] = time.perf_counter() - made
        self._state.batch, self._state.use = batch, self._update.layout.new_use()
        self._state.rollout_steps += 1

    def _select(self, batch: RolloutBatch, plan: StepPlan) -> Tensor | None:
        if not self._update.selects:
            return None
        begun = time.perf_counter()
        with self._trainer.between_steps():
            selected = self._update.select(batch, plan, updates_done=self._state.updates_done)
        self._times["selection_time_s"] = time.perf_counter() - begun
        return selected

    def _evaluate_if_due(self) -> None:
        """At the start of a run and every `--eval-interval` iterations, once; never without held-out data."""
        iteration, interval = self._trainer.iteration, self._trainer.args.eval_interval
        due = self._last_evaluation is None or (interval and iteration % interval == 0)
        if self._collector.has_heldout and due and self._last_evaluation != iteration:
            self._evaluate()

    @property
    def _last_evaluation(self) -> int | None:
        done = self._state.evaluations
        return done[-1]["iteration"] if done else None

    def _evaluate(self) -> None:
        with self._trainer.between_steps():
            row = self._collector.heldout(iteration=self._trainer.iteration)
        self._state.evaluations.append(row)
        self._log.write_evaluation(row, heldout_scalars(row))
        by_length = "  ".join(f"{n}: {v:.0%}" for n, v in row["accuracy_by_length"].items())
        low, high = (100 * end for end in row["accuracy_interval"])
        self._log.say(
            f"held-out accuracy at iteration {row['iteration']}: {row['accuracy']:.1%} ({low:.0f}-{high:.0f})"
            f"  (by context length  {by_length})"
        )

    def _report(
        self, batch: RolloutBatch, plan: StepPlan, outcome: StepOutcome, *, moved: Mapping[str, float | None]
    ) -> None:
        names, pp_group = self._update.metrics, self._trainer.pg_collection.pp
        row: dict[str, Any] = {
            "rollout_step": batch.step,
            **batch.metrics(),
            **_from_last_stage(outcome.losses, names, pp_group=pp_group),
            "grad_norm": None if outcome.grad_norm is None else float(outcome.grad_norm),
            "padding_share": self._update.layout.padding_share(plan),
            **self._times,
            **self._longact_metrics(),
            **moved,
            **telemetry.scalars(self._trainer.iteration),
        }
        row |= _of_slowest_rank({name: row[name] for name in TIMES})
        row["rollout_tokens_per_s"] = _per_second(row["response_tokens"], row["rollout_time_s"])
        if self.longact is not None:
            row[TIME_SHARE] = row[longact_metrics.TIME] / row["step_time_s"]
        # Megatron has written the losses to TensorBoard, and its seams LongAct's scalars and those of the GPUs.
        written = {*outcome.losses, *(name for name in row if name.startswith(("longact/", "gpu/")))}
        self._log.write_step(row, iteration=self._trainer.iteration, in_tensorboard=written - {TIME_SHARE})
        self._show(batch)

    def _show(self, batch: RolloutBatch) -> None:
        missing = missing_signal(batch)
        shown = {"reward": f"{batch.rewards.mean():.3f}", "accuracy": f"{batch.correct.float().mean():.0%}"}
        shown |= {"no signal:": ", ".join(missing)} if missing else {}
        self._log.show(self._trainer.iteration, shown, now_too=bool(missing) and batch.step != self._signals.step)
        warning = self._signals.see(batch)
        if warning is not None:
            self._log.say(warning)

    def _longact_metrics(self) -> dict[str, float | None]:
        if self.longact is None:
            dense: dict[str, float | None] = {
                longact_metrics.ACTIVE_FRACTION_Q: 1.0,
                longact_metrics.ACTIVE_FRACTION_K: 1.0,
            }
            nothing = (
                longact_metrics.MASK_JACCARD,
                longact_metrics.MASK_JACCARD_FIRST,
                longact_metrics.EVER_ACTIVE_FRACTION,
                longact_metrics.MASKED_GRAD_NORM_SHARE,
                longact_metrics.TIME,
                longact_metrics.REFRESHES,
                longact_metrics.REJECTED_REFRESHES,
                TIME_SHARE,
            )
            return dense | dict.fromkeys(nothing)
        return self.longact.metrics()


def _per_second(count: float, seconds: float | None) -> float | None:
    return None if seconds is None else count / seconds


def _of_slowest_rank(times: dict[str, float | None]) -> dict[str, float | None]:
    """The largest of each time over all ranks, the same on all; None where it was not measured."""
    measured = torch.tensor([-1.0 if time is None else time for time in times.values()], dtype=torch.float64)
    on_device = measured.cuda()
    torch.distributed.all_reduce(on_device, op=torch.distributed.ReduceOp.MAX)
    return {name: None if time < 0 else time for name, time in zip(times, on_device.tolist(), strict=True)}


def _from_last_stage(
    losses: dict[str, Tensor], names: Sequence[str], *, pp_group: ProcessGroup
) -> dict[str, float | None]:
    """The step's metrics by name on every pipeline stage; None for what was not reported."""
    nothing = torch.tensor(torch.nan)
    values = torch.stack([losses.get(name, nothing).float().cpu() for name in names])
    if pp_group.size() > 1:
        on_device = values.cuda()
        source = torch.distributed.get_process_group_ranks(pp_group)[-1]
        torch.distributed.broadcast(on_device, src=source, group=pp_group)
        values = on_device.cpu()
    numbers = dict(zip(names, values.tolist(), strict=True))
    return {name: None if number != number else number for name, number in numbers.items()}
