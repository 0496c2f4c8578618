"""How a run ends whose gradients are NaN: said once, and not started again and again."""

import math

import pytest
from megatron.core.rerun_state_machine import RerunState

from megatron_longact.rl.wrong_result import in_words, verdict


@pytest.mark.parametrize(
    ("state", "can_save", "finite", "save", "code", "said"),
    [
        (RerunState.WILL_RERUN_FROM_CHECKPOINT, False, True, False, 17, "again when the step was repeated; go on from"),
        (RerunState.WILL_RERUN_FROM_CHECKPOINT, True, True, True, 16, "saved; started on another GPU"),
        (RerunState.WILL_RERUN_FROM_CHECKPOINT, True, False, False, 17, "the weights are not finite, and not saved"),
        (RerunState.RERUNNING_AGAIN_FROM_CHECKPOINT, True, True, False, 17, "on the same GPU too: it stays down"),
        (RerunState.RERUNNING_FROM_CHECKPOINT, True, True, False, 17, "not the machine's fault"),
        (RerunState.RERUNNING_IN_PLACE, True, True, False, 17, "a fault of the machine"),
    ],
)
def test_a_run_asks_for_another_start_once(
    state: RerunState, can_save: bool, finite: bool, save: bool, code: int, said: str
) -> None:
    found = verdict(state, what="gradients are NaN", iteration=2, can_save=can_save, finite=finite)
    assert found.line.startswith("gradients are NaN at iteration 2")
    assert said in found.line
    assert "\n" not in found.line
    assert (found.save, found.exit_code) == (save, code)


def test_megatrons_messages_in_words() -> None:
    assert in_words("found NaN in local grad norm for bucket #0 in backward pass", math.nan) == "gradients are NaN"
    assert in_words("NaN or Inf in the policy loss", math.inf) == "the loss is infinite"
    assert in_words("found unexpected large grads in bucket #0", 1e9) == "gradients are unusually large (1e+09)"
