"""Responses from megatron-core's inference engine, made with the very model that is being trained.

All ranks call `generate` together, between two training steps and never inside a data iterator.
Shapes: n responses, R response tokens, b rows of one engine batch, s prompt tokens, V vocabulary.

What the static engine does behind one's back (megatron-core 0.19) and what is done about it here:

- its constructor puts the process into `InferenceMode` for good, `generate` seeds torch's global
  generator, `eval()` stays on, RoPE tables made in `torch.inference_mode` stay cached and cannot be
  used in a training forward: `generation_mode` undoes all of it;
- prompts of different length prefill to the shortest and go on token by token: a batch here holds
  prompts of one length;
- one generator and the first request's sampling parameters serve the whole batch, log-probs are
  those of the untempered logits in the logits' dtype, and the end-of-text token is cut off:
  `_Controller` samples, keeps fp32 log-probs and counts that token;
- it stops at one token: of the tokens that end a response it is told that each is that one;
- a prompt that occurs several times is prefilled several times: `_Wrapper` prefills it once.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.inference.utils import InferenceMode
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longact.rl.rollouts.sampling import Sampling, draw, sampled_log_probs, uniform_numbers


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


class RolloutEngine(Protocol):
    """Makes one response for each prompt; called by all ranks with the same arguments."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """Responses in the order of the prompts."""
        ...


class StaticRolloutEngine:
    """Rollouts by `StaticInferenceEngine` with a KV cache, at the model's own TP and PP size.

    model: the unwrapped GPTModel; eod: the token that ends a response, and fills what lies behind an end;
    stop_ids: others that end one; vocab_size: ids from it on, the model's padded ones, are never sampled;
    max_batch_size: responses made at once by one model replica; dp_group: ranks that share the prompts among them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eod: int,
        vocab_size: int,
        max_batch_size: int,
        dp_group: ProcessGroup,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.eod = eod
        self.ends = Ends(eod, stop_ids)
        self.vocab_size = vocab_size
        self.max_batch_size = max_batch_size
        self.dp_group = dp_group

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """See `RolloutEngine`; the model's mode and all generators are kept."""
        n, length = len(prompts), sampling.max_response_length
        tokens = torch.zeros(n, length, dtype=torch.int64)
        log_probs = torch.zeros(n, length, dtype=torch.float32)
        with generation_mode(self.model):
            for rows in self._own_batches(prompts):
                draws = self._generate_batch([prompts[row] for row in rows], sampling)
                made = len(draws.tokens)
                tokens[rows, :made] = torch.stack(draws.tokens, dim=1).cpu()
                log_probs[rows, :made] = torch.stack(draws.log_probs, dim=1).cpu()
                tokens[rows, made:] = self.eod
        return self.ends.cut(*from_all_replicas(tokens, log_probs, dp_group=self.dp_group))

    def _own_batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Rows of this replica's prompts, batch by batch: one length each, equal prompts adjacent.

        Equal prompts stay on one replica; the replicas take turns in order of length.
        """
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].tokens), prompts[row].index))
        groups = [list(rows) for _, rows in groupby(order, key=lambda r: prompts[r].tokens)]
        own = groups[self.dp_group.rank() :: self.dp_group.size()]
        for _, same_length in groupby(own, key=lambda rows: len(prompts[rows[0]].tokens)):
            rows = [row for group in same_length for row in group]
            for begin in range(0, len(rows), self.max_batch_size):
                yield rows[begin : begin + self.max_batch_size]

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> _Draws:
        prompt_length = len(prompts[0].tokens)
        draws = _Draws(prompts, sampling, vocab_size=self.vocab_size, ends=self.ends)
        context = StaticInferenceContext(
            max_batch_size=len(prompts),
            max_sequence_length=prompt_length + sampling.max_response_length,
        )
        wrapper = _Wrapper(self.model, context, copies=_common_copies(prompts))
        engine = _Engine(_Controller(wrapper, draws, eod=self.eod), legacy=True)
        params = SamplingParams(num_tokens_to_generate=sampling.max_response_length)
        engine.generate(
            inference_requests=[
                InferenceRequest(
                    request_id=i,
                    prompt="",
                    sampling_params=params,
                    prompt_tokens=list(prompt.tokens),
                    arrival_time=0.0,
                    status=Status.ACTIVE_BUT_NOT_GENERATING_TOKENS,
                )
                for i, prompt in enumerate(prompts)
            ]
        )
        return draws


def from_all_replicas(*parts: Tensor, dp_group: ProcessGroup) -> list[Tensor]:
    """Sums over the replicas, on the CPU; each row stands on one of them and is zero elsewhere, so it is exact."""
    if dp_group.size() == 1:
        return list(parts)
    on_device = [part.cuda() for part in parts]
    for part in on_device:
        torch.distributed.all_reduce(part, group=dp_group)
    return [part.cpu() for part in on_device]


@contextmanager
def generation_mode(model: nn.Module) -> Iterator[None]:
    """Make `model` a generator for the duration of the block; then all is as it was before.

    Enters the engine's `InferenceMode` and `eval()` without gradients. On the way out, also when an
    exception flies: the flag, every module's mode, every generator (python, numpy, torch CPU and
    device, Megatron's tracker), and no RoPE table made under `torch.inference_mode` stays cached.
    """
    was_training = {module: module.training for module in model.modules()}
    generators = _generator_states()
    was_active = InferenceMode.is_active()
    InferenceMode.set_active()
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        if not was_active:
            InferenceMode.unset_active()
        for module, training in was_training.items():
            module.training = training
            if hasattr(module.forward, "cache_clear"):
                module.forward.cache_clear()
        _restore_generators(generators)


class _Draws:
    """What one batch samples: the random numbers that it uses, tokens and log-probs [b] a step."""

    def __init__(self, prompts: Sequence[Prompt], sampling: Sampling, *, vocab_size: int, ends: Ends) -> None:
        self.sampling = sampling
        self.ends = ends
        self.vocab_size = vocab_size
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self._uniforms = torch.from_numpy(
            np.stack(
                [
                    uniform_numbers(
                        sampling.seed,
                        sampling.step,
                        prompt.index,
                        prompt.sample,
                        count=sampling.max_response_length,
                    )
                    for prompt in prompts
                ]
            )
        )

    def next(self, logits: Tensor) -> Tensor:
        """The next token [b] of each row, from logits [b, padded V], as the engine is to see it."""
        log_probs = sampled_log_probs(logits[:, : self.vocab_size], sampling=self.sampling)
        if self.sampling.greedy:
            tokens = log_probs.argmax(-1)
        else:
            uniforms = self._uniforms[:, len(self.tokens)].to(log_probs.device)
            tokens = draw(log_probs, uniforms)
        self.tokens.append(tokens)
        self.log_probs.append(log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        return self.ends.as_eod(tokens)


class _Controller(TextGenerationController):
    """The engine's sampling loop with our sampling in it, and without turning tokens into text."""

    def __init__(self, wrapper: GPTInferenceWrapper, draws: _Draws, *, eod: int) -> None:
        super().__init__(wrapper, _EndOfText(eod))
        self.draws = draws

    def sample_from_logits(self, last_token_logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.draws.next(last_token_logits)

    def detokenize_generations(self, *args: Any, **kwargs: Any) -> tuple[str, None]:
        return "", None


@dataclass(frozen=True)
class _EndOfText:
    """All that the engine's loop asks of a tokenizer."""

    eod: int


class _Engine(StaticInferenceEngine):
    """The static engine without its progress bar."""

    def run_engine(self) -> None:
        while self.scheduler.have_requests_pending():
            requests = self.scheduler.active_request_pool.copy()
            done = self.controller.generate_all_output_tokens_static_batch(requests, OrderedDict())
            self.scheduler.update_requests_pools(result_dict=done)


class _Wrapper(GPTInferenceWrapper):
    """The model behind the engine; prefills one row in `copies`, for rows that are equal."""

    def __init__(self, model: nn.Module, context: StaticInferenceContext, *, copies: int) -> None:
        super().__init__(model, context)
        self.copies = copies

    def run_one_forward_step(
        self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        if self.copies == 1 or self.inference_context.sequence_len_offset > 0:
            return super().run_one_forward_step(inference_input, recv_buffer_seq_len)
        rows = inference_input["tokens"].shape[0]
        for name in ("tokens", "position_ids"):
            inference_input[name] = inference_input[name][:: self.copies]
        logits = super().run_one_forward_step(inference_input, recv_buffer_seq_len)
        with torch.inference_mode():
            for memory in self.inference_context.key_value_memory_dict.values():
                for cache in memory:  # [s, b, groups, channels]
                    unique = cache[:, : rows // self.copies]
                    cache.copy_(unique.repeat_interleave(self.copies, dim=1))
            return None if logits is None else logits.repeat_interleave(self.copies, dim=0)


def _common_copies(prompts: Sequence[Prompt]) -> int:
    """How often each prompt occurs in a row, if all do equally often; else 1."""
    counts = {len(list(rows)) for _, rows in groupby(prompts, key=lambda prompt: prompt.tokens)}
    return counts.pop() if len(counts) == 1 else 1


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
