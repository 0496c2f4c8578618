"""What a run does when a step's result is wrong: NaN, Inf, or a spike that Megatron's rerun state machine looks for.

That machine repeats the step. A result that comes again could still be the GPU's fault, so it asks for a checkpoint
and for another start on another GPU, exit code 16; on the same GPU again it asks once more, without end. Here a run
asks for another start once, if there is a checkpoint to start from, and otherwise ends with 17, which nobody requeues.
Source: megatron/core/rerun_state_machine.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    RerunState,
    get_rerun_state_machine,
)
from torch import nn


@dataclass(frozen=True)
class Verdict:
    """How the run ends: in one line for the terminal, with a checkpoint or without, and with which exit code."""

    line: str
    save: bool
    exit_code: int


def judge(model: Sequence[nn.Module], *, iteration: int, can_save: bool) -> Verdict:
    """The end of a run whose step `iteration` Megatron gave up; collective, right after `train_step`."""
    return verdict(
        get_rerun_state_machine().state,
        what=_what_was_found(),
        iteration=iteration,
        can_save=can_save,
        finite=_all_finite(model),
    )


def verdict(state: RerunState, *, what: str, iteration: int, can_save: bool, finite: bool) -> Verdict:
    """What follows from the machine's state; what: "gradients are NaN"; finite: whether all weights are."""
    found, stay_down = f"{what} at iteration {iteration}", EXIT_CODE_FAILED_ON_RESULT_VALIDATION
    if state == RerunState.RERUNNING_IN_PLACE:
        return Verdict(f"{found}, and not when the step was repeated: a fault of the machine", False, stay_down)
    if state == RerunState.RERUNNING_FROM_CHECKPOINT:
        return Verdict(f"{found}, on another GPU too: not the machine's fault; {_ADVICE}", False, stay_down)
    if state == RerunState.RERUNNING_AGAIN_FROM_CHECKPOINT:
        return Verdict(f"{found}, after another start on the same GPU too: it stays down; {_ADVICE}", False, stay_down)
    again = f"{found}, and again when the step was repeated"
    if not finite:
        return Verdict(f"{again}: the weights are not finite, and not saved; {_ADVICE}", False, stay_down)
    if not can_save:
        return Verdict(f"{again}; {_ADVICE}", False, stay_down)
    other = "saved; started on another GPU, the run repeats the step and says whether the machine is at fault"
    return Verdict(f"{again}: {other}; else {_ADVICE}", True, EXIT_CODE_RESUME_TO_DISAMBIGUATE)


_ADVICE = "go on from an earlier checkpoint with a smaller --lr, or look at the rewards and the data"


def _what_was_found() -> str:
    """In words; on all ranks that of the first one that found something."""
    machine, found = get_rerun_state_machine(), None
    if machine.failed_validation_call is not None:
        value = float(machine.initial_result) if machine.initial_result is not None else math.nan
        found = in_words(machine.failed_validation_call.caller.message, value)
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, found)
    return next((text for text in told if text is not None), "a result is wrong")


def in_words(message: str, value: float) -> str:
    """Megatron's message about a value, as the beginning of a sentence."""
    subject = "gradients are" if "grad" in message else "the loss is" if "loss" in message else f"{message}: it is"
    kind = "NaN" if math.isnan(value) else "infinite" if math.isinf(value) else f"unusually large ({value:g})"
    return f"{subject} {kind}"


def _all_finite(model: Sequence[nn.Module]) -> bool:
    finite = all(bool(torch.isfinite(p).all()) for chunk in model for p in chunk.parameters())
    on_device = torch.tensor(int(finite)).cuda()
    torch.distributed.all_reduce(on_device, op=torch.distributed.ReduceOp.MIN)
    return bool(on_device.item())
