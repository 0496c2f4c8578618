"""State of ours in Megatron's checkpoints.

It rides in the optimizer-parameter scheduler's state, which Megatron saves as plain values in every checkpoint
format, also when it saves asynchronously, loads at any parallel layout, and leaves alone with `--finetune`
and `--no-load-optim`. Source: megatron/training/checkpointing.py, `generate_state_dict`, `load_checkpoint`.
"""

from typing import Any, Protocol


class Stateful(Protocol):
    """Something with a state: a plain dict, equal on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """The state now."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        ...


def carry_state(opt_param_scheduler: Any, name: str, stateful: Stateful) -> None:
    """Let the scheduler's `state_dict` and `load_state_dict` carry that of `stateful` under `name`.

    A checkpoint without it loads too: `stateful` is then left as it is. May be called once for each name.
    """
    save, load = opt_param_scheduler.state_dict, opt_param_scheduler.load_state_dict

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = save()
        assert name not in state, f"two states are called {name}"
        return {**state, name: stateful.state_dict()}

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        load({key: value for key, value in state_dict.items() if key != name})
        if name in state_dict:
            stateful.load_state_dict(state_dict[name])

    opt_param_scheduler.state_dict = state_dict
    opt_param_scheduler.load_state_dict = load_state_dict
