"""LongAct attached by a trainer's hooks, when Megatron's checkpoint may have been loaded already.

Shared by the files beside it. `megatron_longact.run` needs none of this.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion.torch_dist import read_common_state
from megatron_longact.megatron.checkpointing import carry_state

NAME = "longact"


class _AttachedTo:
    """The state of whatever LongAct is attached to an optimizer now."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        longact = LongAct.of(self._optimizer)
        assert longact is not None, "LongAct was detached before the checkpoint was saved"
        return longact.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        longact = LongAct.of(self._optimizer)
        assert longact is not None, "LongAct was detached before the checkpoint was loaded"
        longact.load_state_dict(state_dict)


def attach(model_chunks: Sequence[Any], optimizer: Any, scheduler: Any, config: LongActConfig) -> LongAct:
    """Attach, and let the scheduler's state in checkpoints carry LongAct's from now on; collective."""
    longact = LongAct.attach(model_chunks, optimizer, config)
    carry_state(scheduler, NAME, _AttachedTo(optimizer))
    return longact


def attach_again(model_chunks: Sequence[Any], optimizer: Any) -> LongAct:
    """After the trainer replaced `config.finalize_model_grads_func`: hook the new one, keep the state; collective."""
    longact = LongAct.of(optimizer)
    assert longact is not None, "attach_again was called before attach"
    state = longact.state_dict()
    longact.detach()
    longact = LongAct.attach(model_chunks, optimizer, longact.config)
    longact.load_state_dict(state)
    return longact


def restore(longact: LongAct, iteration_folder: Path, *, key: str = "opt_param_scheduler") -> bool:
    """Go on from the state in a checkpoint that was loaded before `attach`; False if it holds none.

    iteration_folder: the folder of one iteration, in torch_dist format; key: where the trainer saves its scheduler.
    """
    state = read_common_state(iteration_folder).get(key, {}).get(NAME)
    if state is not None:
        longact.load_state_dict(state)
    return state is not None


def real_tokens(packed: Any | None, attention_mask: Tensor | None) -> Tensor | None:
    """Which tokens of a micro-batch are no padding, before context-parallel slicing; None if nothing says so.

    packed: a `PackedSeqParams` with `seq_lens`, the lengths of its sequences before the trainer padded them, in order:
    what is behind a sequence is padding, and so are further sequences. Returns [1, t].
    attention_mask: without it, bool [b, 1, s or 1, s], True where a token must not look. Returns [b, s].
    """
    if packed is None:
        return None if attention_mask is None else (~attention_mask).any(dim=2)[:, 0]
    if not hasattr(packed, "seq_lens"):
        return None
    bounds, lengths = packed.cu_seqlens_q, packed.seq_lens
    lengths = torch.nn.functional.pad(lengths, (0, len(bounds) - 1 - len(lengths)))
    places = torch.arange(int(bounds[-1]), device=bounds.device)
    sequence = torch.bucketize(places, bounds[1:].to(places.dtype), right=True)
    return (places - bounds[sequence] < lengths[sequence])[None]


def name_tokens(longact: LongAct, *, attention_mask_of: Callable[..., Any] = lambda inputs, named: None) -> Any:
    """A forward pre-hook of model chunks that names the `real_tokens` of each training forward.

    attention_mask_of: from the positional and named arguments of such a forward.
    """

    def name(chunk: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            tokens = real_tokens(named.get("packed_seq_params"), attention_mask_of(inputs, named))
            if tokens is not None:
                longact.set_tokens(tokens)

    return name
