"""What every engine of generation has in common: prompts, responses, and a model that generates for a while.

Shapes: n responses, R response tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.utils import InferenceMode
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longact.generation.sampling import Sampling


@dataclass(frozen=True)
class Prompt:
    """One response to be made: `tokens`, and which prompt and which of its samples it is.

    `index` and `sample` choose the random numbers. Equal `tokens` are prefilled together.
    """

    tokens: tuple[int, ...]
    index: int
    sample: int = 0


@dataclass(frozen=True)
class Rollouts:
    """Responses in the order of their prompts, on the CPU, identical on all ranks.

    tokens: int64 [n, R], the end-of-text token where nothing was sampled; lengths: int64 [n], the
    token that ends a response included; log_probs: fp32 [n, R] of the distribution that was sampled, 0 where
    nothing was; finished: bool [n], whether the response ended by itself.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    finished: Tensor

    def response(self, i: int) -> list[int]:
        """The tokens of a response, without the one that ended it."""
        tokens: list[int] = self.tokens[i, : int(self.lengths[i]) - int(self.finished[i])].tolist()
        return tokens


class RolloutEngine(Protocol):
    """Makes one response for each prompt; called by all ranks with the same arguments."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """Responses in the order of the prompts."""
        ...


@dataclass(frozen=True)
class Ends:
    """The tokens that end a response: `eod`, which also fills what lies behind, and others."""

    eod: int
    others: Sequence[int] = ()

    def found_in(self, tokens: Tensor) -> Tensor:
        """Where an end stands: bool, in the shape of the tokens."""
        found = tokens == self.eod
        for other in self.others:
            found |= tokens == other
        return found

    def as_eod(self, tokens: Tensor) -> Tensor:
        """The tokens with eod in place of each end: Megatron's engines know one."""
        return tokens.masked_fill(self.found_in(tokens), self.eod) if self.others else tokens

    def cut(self, tokens: Tensor, log_probs: Tensor) -> Rollouts:
        """Cut each response after its first end; tokens and log_probs are [n, R]."""
        ends = self.found_in(tokens)
        kept = ends.long().cumsum(-1) - ends.long() == 0
        return Rollouts(
            tokens=tokens.masked_fill(~kept, self.eod),
            lengths=kept.sum(-1),
            log_probs=log_probs.masked_fill(~kept, 0.0),
            finished=ends.any(-1),
        )


def replicas_share_experts(sizes: Any) -> bool:
    """Whether ranks of several replicas do; sizes: Megatron's arguments or a `TransformerConfig`, with like names."""
    of_one = sizes.tensor_model_parallel_size
    return sizes.expert_model_parallel_size > 1 or (sizes.expert_tensor_parallel_size or 1) > of_one


class Replicas:
    """Who makes which responses: each model replica its own, and afterwards all ranks have all of them.

    dp_group: the ranks that share the prompts among them, by context parallelism too; expert_group: those that share
    experts, `tp_ep` of Megatron's groups. Each layer of experts is a collective of the latter, so ranks that are in
    both groups make the same responses, step by step: together they are one replica.
    """

    def __init__(self, dp_group: ProcessGroup, expert_group: ProcessGroup | None = None) -> None:
        own = torch.distributed.get_rank()
        sharing = [own] if expert_group is None else torch.distributed.get_process_group_ranks(expert_group)
        together = [rank for rank in torch.distributed.get_process_group_ranks(dp_group) if rank in sharing]
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        if len(sharing) % tp_size and tp_size % len(sharing):
            raise ValueError(
                f"rollouts need experts over a multiple or a part of the tensor parallel size {tp_size}, not over "
                f"{len(sharing)} ranks: change --expert-model-parallel-size or --expert-tensor-parallel-size"
            )
        self._dp_group = dp_group
        self._expert_group = expert_group if len(together) > 1 else None
        self._speaks = own == together[0]
        self.count = dp_group.size() // len(together)
        self.index = dp_group.rank() // len(together)

    def drawn_alike(self, tokens: Tensor) -> Tensor:
        """The tokens [b] that the replica's first rank has drawn: a last bit may differ between its ranks."""
        if self._expert_group is not None:
            source = torch.distributed.get_process_group_ranks(self._expert_group)[0]
            torch.distributed.broadcast(tokens, src=source, group=self._expert_group)
        return tokens

    def gathered(self, *parts: Tensor) -> list[Tensor]:
        """Sums over the replicas, on the CPU; each row stands on one of them and is zero elsewhere, so it is exact."""
        if self._dp_group.size() == 1:
            return list(parts)
        on_device = [part.cuda() if self._speaks else torch.zeros_like(part).cuda() for part in parts]
        for part in on_device:
            torch.distributed.all_reduce(part, group=self._dp_group)
        return [part.cpu() for part in on_device]


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Make `model` a generator for the duration of the block; then all is as it was before.

    Enters the engine's `InferenceMode` and `eval()` without gradients. On the way out, also when an
    exception flies: the flag, every module's mode, every generator (python, numpy, torch CPU and
    device, Megatron's tracker), and nothing made under `torch.inference_mode` stays cached: RoPE tables, Megatron's
    global buffers, into which sequence parallelism gathers, what layers in FP8 keep.
    """
    was_training = {module: module.training for module in model.modules()}
    _forget_rope_tables(model)  # those of training may be cut for context parallelism
    generators = _generator_states()
    was_active = InferenceMode.is_active()
    InferenceMode.set_active()
    try:
        model.eval()
        with torch.no_grad(), _fp8_apart(model):
            yield
    finally:
        if not was_active:
            InferenceMode.unset_active()
        for module, training in was_training.items():
            module.training = training
        _forget_rope_tables(model)
        _forget_inference_buffers()
        _restore_generators(generators)


@contextmanager
def _fp8_apart(model: nn.Module) -> Iterator[None]:
    """Keep what layers in FP8 make for generation and for training apart.

    Transformer Engine's modules keep their scales, made in the first forward, and their weights in FP8, which it
    quantises anew in a step's first micro-batch alone. Without this the scales would be tensors of
    `torch.inference_mode`, which no training step can write to, and rollouts would take the weights before the last
    step. So that mode, which Megatron's engines enter by themselves, is `torch.no_grad` inside, for the whole process.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    if not any(getattr(config, name, None) for config in configs for name in ("fp8", "fp4")):
        yield
        return
    mode = torch._C._InferenceMode
    _forget_quantized_weights(model)
    torch._C._InferenceMode = _no_inference_mode  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch._C._InferenceMode = mode  # type: ignore[misc]
        _forget_quantized_weights(model)


def _no_inference_mode(enabled: bool = True) -> Any:
    return torch.no_grad() if enabled else torch.enable_grad()


def _forget_quantized_weights(model: nn.Module) -> None:
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's name, for FP4 as well


def _forget_rope_tables(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module.forward, "cache_clear"):
            module.forward.cache_clear()


def _forget_inference_buffers() -> None:
    buffers = parallel_state.get_global_memory_buffer().buffer
    for key in [key for key, buffer in buffers.items() if buffer.is_inference()]:
        del buffers[key]


def _generator_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
