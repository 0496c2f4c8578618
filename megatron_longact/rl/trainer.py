"""Megatron's own `train`, opened up: one optimizer step at a time, with room between the steps.

Every piece is Megatron's: `train_step`, `training_log`, `checkpoint_and_decide_exit`. What `train` does
around them is done here, in its order. Source: megatron/training/training.py, `train` (0.19).
"""

from __future__ import annotations

import gc
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches, reconfigure_num_microbatches_calculator
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import training
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.global_vars import get_signal_handler, get_timers
from torch import Tensor, nn

from megatron_longact.rl.wrong_result import Verdict, judge

STOPPED_EARLY = 75
"""Exit code of a run that saved and ended because of a signal or `--exit-duration-in-mins`: started again, it goes on.

The EX_TEMPFAIL of sysexits.h.
"""


def stop_on_signals(args: Namespace) -> None:
    """With `--exit-signal-handler`, let SIGTERM and SIGUSR1 do what `--exit-signal` does, on this rank.

    Slurm sends SIGUSR1 when a job asks for it (`sbatch --signal`) and SIGTERM when it preempts one; Megatron listens to
    one of them, after `initialize_megatron`.
    """
    if args.exit_signal_handler:
        handler = signal.getsignal(args.exit_signal)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handler)


@dataclass(frozen=True)
class StepOutcome:
    """What Megatron's `train_step` returned; `losses` is empty but on the last pipeline stage."""

    losses: dict[str, Tensor]
    skipped: bool
    should_exit: bool
    grad_norm: float | None
    num_zeros_in_grad: int | None
    max_attention_logit: float | None


@dataclass(frozen=True)
class StepSize:
    """Responses and real tokens of a step on all replicas, and the sum of their sequences' squared lengths."""

    responses: int
    tokens: int
    squared_lengths: int


@dataclass(frozen=True)
class _CountsResponses:
    """The scheduler as `train_step` sees it: a step goes on by its responses, in however few rows they are packed."""

    scheduler: Any
    responses: int

    def step(self, increment: int) -> None:
        self.scheduler.step(increment=self.responses)


class MegatronTrainer:
    """A model, its optimizer and its scheduler, as `setup_model_and_optimizer` returned them."""

    def __init__(
        self,
        args: Namespace,
        model: Sequence[nn.Module],
        optimizer: Any,
        opt_param_scheduler: Any,
        *,
        checkpointing_context: dict[str, Any],
    ) -> None:
        self.args = args
        self.model = list(model)
        self.optimizer = optimizer
        self.opt_param_scheduler = opt_param_scheduler
        self.config = get_model_config(model[0])
        self.pg_collection = get_attr_wrapped_model(model[0], "pg_collection")
        self.iteration: int = args.iteration
        self.exit_code = 0
        self.verdict: Verdict | None = None
        """Set when a wrong result has ended the run."""
        self._checkpointing_context = checkpointing_context
        self._total_losses: dict[str, Any] = {}
        self._report_memory = True
        self._first_iteration = True
        self._flops = args.num_floating_point_operations_so_far
        self._flops_since_log = 0.0
        self._overlaps = training.should_disable_forward_pre_hook(args)
        self._pre_hooks_on = False
        self._param_sync_func: Any = None

    def begin(self) -> None:
        """What `train` does before its first step."""
        args, config = self.args, self.config
        for chunk in self.model:
            chunk.train()
        get_rerun_state_machine().current_iteration = self.iteration
        if args.manual_gc:
            gc.disable()
            gc.collect()
        config.grad_scale_func = self.optimizer.scale_loss
        config.timers = get_timers()
        if args.overlap_grad_reduce:
            config.no_sync_func = _one_or_all([chunk.no_sync for chunk in self.model])
            if args.align_grad_reduce:
                config.grad_sync_func = _one_or_all([c.start_grad_sync for c in self.model])
        if args.overlap_param_gather and args.align_param_gather:
            config.param_sync_func = _one_or_all([c.start_param_sync for c in self.model])
        if config.finalize_model_grads_func is None:
            config.finalize_model_grads_func = finalize_model_grads
        if self._overlaps:
            # The first step runs without: an error in loading then shows instead of spreading.
            training.disable_forward_pre_hook(self.model, param_sync=False)
            self._param_sync_func, config.param_sync_func = config.param_sync_func, None
        get_timers()("interval-time", log_level=0).start(barrier=True)

    def step(
        self, forward_step: Callable[..., Any], micro_batches: Sequence[Any], *, micro_batch_size: int, size: StepSize
    ) -> StepOutcome:
        """One optimizer step on this replica's micro-batches; logged, not saved."""
        with self._schedule(len(micro_batches), micro_batch_size):
            return self._step(forward_step, micro_batches, size=size)

    @contextmanager
    def _schedule(self, num_microbatches: int, micro_batch_size: int) -> Iterator[None]:
        """Let Megatron count micro-batches as they are: packed ones differ in number from step to step."""
        args, own = self.args, (self.args.global_batch_size, self.args.micro_batch_size)
        if num_microbatches == get_num_microbatches() and micro_batch_size == args.micro_batch_size:
            yield
            return
        args.micro_batch_size = micro_batch_size
        self._count_microbatches(num_microbatches * micro_batch_size * args.data_parallel_size, micro_batch_size)
        try:
            yield
        finally:
            args.micro_batch_size = own[1]
            self._count_microbatches(*own)

    def _count_microbatches(self, global_batch_size: int, micro_batch_size: int) -> None:
        reconfigure_num_microbatches_calculator(
            rank=self.args.rank,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_size=self.args.data_parallel_size,
        )

    def _step(self, forward_step: Callable[..., Any], micro_batches: Sequence[Any], *, size: StepSize) -> StepOutcome:
        maybe_finalize_async_save(blocking=False)
        self.args.curr_iteration = self.iteration
        losses, skipped, _, should_exit, _, *statistics = training.train_step(
            forward_step,
            _one_or_all([RerunDataIterator(iter(micro_batches)) for _ in self.model]),
            self.model,
            self.optimizer,
            _CountsResponses(self.opt_param_scheduler, size.responses),
            self.config,
            get_forward_backward_func(),
            iteration=self.iteration,
        )
        outcome = StepOutcome(losses, bool(skipped), should_exit, *statistics)
        if should_exit:
            self.verdict = judge(self.model, iteration=self.iteration + 1, can_save=bool(self.args.save))
            self.exit_code = self.verdict.exit_code
            if self.verdict.save:
                self.save()
            return outcome
        if self._overlaps and not self._pre_hooks_on and not skipped:
            self._enable_pre_hooks()
        self.iteration += 1
        self.args.consumed_train_samples += size.responses
        self._log(outcome, size)
        return outcome

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Room to read, run or swap the weights: they are complete on every rank, no hook gathers them.

        Transformer Engine keeps FP8 copies of weights from micro-batch to micro-batch, which Megatron's schedules tell
        it to make anew; the engines of generation do not.
        """
        for chunk in self.model:
            chunk.set_is_first_microbatch()  # type: ignore[operator]
        was_on = self._pre_hooks_on
        if was_on:
            training.disable_forward_pre_hook(self.model, optimizer=self.optimizer)
            self._pre_hooks_on = False
        timer = get_timers()("interval-time")
        timer.stop()
        yield
        timer.start(barrier=False)
        if was_on:
            training.enable_forward_pre_hook(self.model)
            self._pre_hooks_on = True

    def save_or_exit(self) -> bool:
        """Save if it is due (`--save-interval` and what else Megatron has); whether to exit now."""
        self._flops_since_log = training.post_training_step_callbacks(
            self.model,
            self.optimizer,
            self.opt_param_scheduler,
            self.iteration,
            None,
            self._flops_since_log,
        )
        exiting: bool = training.checkpoint_and_decide_exit(*self._checkpoint_arguments(), None)
        if exiting and not self._is_exit_iteration():
            self.exit_code = STOPPED_EARLY
        return exiting

    def _is_exit_iteration(self) -> bool:
        args = self.args
        at_interval = bool(args.exit_interval) and self.iteration % args.exit_interval == 0
        return at_interval or self.iteration in (args.phase_transition_iterations or ())

    def asked_to_stop(self) -> bool:
        """Whether a signal of `--exit-signal-handler` has reached any rank; collective."""
        return self.args.exit_signal_handler and any(get_signal_handler().signals_received())

    def save(self) -> None:
        """Save now."""
        model, optimizer, scheduler, iteration, *rest = self._checkpoint_arguments()
        training.save_checkpoint_and_time(iteration, model, optimizer, scheduler, *rest)

    @property
    def saved_now(self) -> bool:
        """Whether `--save-interval` has just saved this iteration."""
        interval = self.args.save_interval
        return bool(interval) and self.iteration % interval == 0

    def finish(self) -> None:
        """What `train` does after its last step."""
        if self._pre_hooks_on:
            training.disable_forward_pre_hook(self.model, optimizer=self.optimizer)
            self._pre_hooks_on = False
        maybe_finalize_async_save(blocking=True, terminate=True)

    def _checkpoint_arguments(self) -> tuple[Any, ...]:
        return (
            self.model,
            self.optimizer,
            self.opt_param_scheduler,
            self.iteration,
            self._flops,
            self._checkpointing_context,
        )

    def _enable_pre_hooks(self) -> None:
        training.enable_forward_pre_hook(self.model)
        self.config.param_sync_func = self._param_sync_func
        self._pre_hooks_on = True

    def _log(self, outcome: StepOutcome, size: StepSize) -> None:
        flops = training.num_floating_point_operations(
            self.args,
            size.responses,
            seqlen_squared_sum_in_batch=size.squared_lengths,
            total_real_tokens_in_batch=size.tokens,
        )
        self._flops += flops
        self._flops_since_log += flops
        self._report_memory = training.training_log(
            outcome.losses,
            self._total_losses,
            get_canonical_lr_for_logging(self.optimizer.param_groups),
            self.iteration,
            self.optimizer.get_loss_scale().item(),
            self._report_memory,
            int(outcome.skipped),
            outcome.grad_norm,
            None,
            outcome.num_zeros_in_grad,
            outcome.max_attention_logit,
            pg_collection=self.pg_collection,
            is_first_iteration=self._first_iteration,
            seqlen_squared_sum_in_batch=size.squared_lengths,
            total_real_tokens_in_batch=size.tokens,
        )
        self._first_iteration = False


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
