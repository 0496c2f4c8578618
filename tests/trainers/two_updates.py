"""What a trainer's worker is asked to do, whichever trainer it is."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_longact import LongAct


def two_updates(
    worker: Any,
    *,
    train: Callable[..., float],
    weights: Callable[[Any], dict[str, Tensor]],
    save: Callable[[], Any],
) -> dict[str, Any]:
    """Two updates by `train(worker, seed=…)`, `save` after the first; weights are returned of before it too."""
    longact = LongAct.of(worker.optimizer)
    assert longact is not None
    exported, norms, states, tokens = [weights(worker)], [], [], []
    for update in range(2):
        norms.append(train(worker, seed=update))
        states.append(longact.state_dict())
        tokens.append(longact.step.tokens)
        exported.append(weights(worker))
        if update == 0:
            save()
    return {"norms": norms, "states": states, "tokens": tokens, "exported": exported}
