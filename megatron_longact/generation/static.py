"""Responses from megatron-core's inference engine, made with the very model that is being trained.

All ranks call `generate` together, between two training steps and never inside a data iterator.
Shapes: n responses, R response tokens, b rows of one engine batch, s prompt tokens, V vocabulary.

What the static engine does behind one's back (megatron-core 0.19) and what is done about it here:

- its constructor puts the process into `InferenceMode` for good, `generate` seeds torch's global
  generator, `eval()` stays on, RoPE tables made in `torch.inference_mode` stay cached and cannot be
  used in a training forward: `generation_mode` undoes all of it;
- prompts of different length prefill to the shortest and go on token by token: a batch here holds
  prompts of one length, or of lengths so near that this takes fewer steps than a batch of their own (`batches_of`);
- one generator and the first request's sampling parameters serve the whole batch, log-probs are
  those of the untempered logits in the logits' dtype, and the end-of-text token is cut off:
  `_Controller` samples, keeps fp32 log-probs and counts that token;
- it stops at one token: of the tokens that end a response it is told that each is that one;
- it refuses sequence parallelism: `whole_sequences` switches that off while it generates;
- it knows one chunk of the model a rank: `_Wrapper` goes round the stages once for each of a virtual pipeline;
- it rotates all cached keys anew for each token: `rotated_keys`;
- a prompt that occurs several times is prefilled several times: `_Wrapper` prefills it once;
- a batch is prefilled in one piece, whose activations no cache of a CPU core holds: `_Wrapper` goes row by row there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from megatron.core.inference.communication_utils import (
    is_pipeline_first_stage,
    is_pipeline_last_stage,
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
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
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longact.generation.engine import Ends, Prompt, Replicas, Rollouts, generation_mode
from megatron_longact.generation.rotated_keys import rotated_keys
from megatron_longact.generation.sampling import Sampling, draw, sampled_log_probs, uniform_numbers
from megatron_longact.generation.whole_sequences import whole_sequences


class StaticRolloutEngine:
    """Rollouts by `StaticInferenceEngine` with a KV cache, at the model's own TP and PP size, sequence parallel or not.

    model: the unwrapped GPTModel; later_chunks: with a virtual pipeline this rank's others, in their order;
    eod: the token that ends a response, and fills what lies behind an end; stop_ids: others that end one;
    vocab_size: ids from it on, the model's padded ones, are never sampled;
    max_batch_size: responses made at once by one model replica; dp_group, expert_group: see `Replicas`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eod: int,
        vocab_size: int,
        max_batch_size: int,
        dp_group: ProcessGroup,
        expert_group: ProcessGroup | None = None,
        stop_ids: Sequence[int] = (),
        later_chunks: Sequence[nn.Module] = (),
    ) -> None:
        self.chunks = nn.ModuleList([model, *later_chunks])
        self.eod = eod
        self.ends = Ends(eod, stop_ids)
        self.vocab_size = vocab_size
        self.max_batch_size = max_batch_size
        self.replicas = Replicas(dp_group, expert_group)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """See `RolloutEngine`; the model's mode and all generators are kept."""
        n, length = len(prompts), sampling.max_response_length
        tokens = torch.zeros(n, length, dtype=torch.int64)
        log_probs = torch.zeros(n, length, dtype=torch.float32)
        with generation_mode(self.chunks), whole_sequences(self.chunks), rotated_keys(self.chunks):
            for rows in self._own_batches(prompts, sampling.max_response_length):
                draws = self._generate_batch([prompts[row] for row in rows], sampling)
                tokens[rows], log_probs[rows] = draws.responses(fill=self.eod)
        return self.ends.cut(*self.replicas.gathered(tokens, log_probs))

    def _own_batches(self, prompts: Sequence[Prompt], response_length: int) -> Iterator[list[int]]:
        """Rows of this replica's prompts, batch by batch, in order of length, equal prompts adjacent.

        Equal prompts stay on one replica; the replicas take turns in order of length.
        """
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].tokens), prompts[row].index))
        groups = [list(rows) for _, rows in groupby(order, key=lambda r: prompts[r].tokens)]
        own = [row for group in groups[self.replicas.index :: self.replicas.count] for row in group]
        lengths = [len(prompts[row].tokens) for row in own]
        for batch in batches_of(lengths, most=self.max_batch_size, response_length=response_length):
            yield own[batch]

    def _generate_batch(self, prompts: Sequence[Prompt], sampling: Sampling) -> _Draws:
        draws = _Draws(prompts, sampling, vocab_size=self.vocab_size, ends=self.ends, alike=self.replicas.drawn_alike)
        context = StaticInferenceContext(
            max_batch_size=len(prompts),
            max_sequence_length=max(len(prompt.tokens) for prompt in prompts) + sampling.max_response_length,
        )
        wrapper = _Wrapper(self.chunks, context, copies=_common_copies(prompts))
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


def batches_of(lengths: Sequence[int], *, most: int, response_length: int) -> Iterator[slice]:
    """Batches of sorted prompt lengths: at most `most` prompts each, none much longer than the one before it.

    A prompt that is g tokens longer costs its batch g more steps, and a batch of its own as many steps as a response
    has tokens.
    """
    begin = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or i - begin == most or lengths[i] - lengths[i - 1] > response_length:
            yield slice(begin, i)
            begin = i


class _Draws:
    """What one batch samples: the random numbers that it uses, tokens and log-probs [b] a step.

    The first step is at the end of the shortest prompt; until a row's own prompt ends, what it draws is thrown away.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        vocab_size: int,
        ends: Ends,
        alike: Callable[[Tensor], Tensor],
    ) -> None:
        self.sampling = sampling
        self._alike = alike
        self.ends = ends
        self.vocab_size = vocab_size
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        self._starts = lengths - lengths.min()
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
        last = self.sampling.max_response_length - 1
        positions = (len(self.tokens) - self._starts).clamp(min=0)
        if self.sampling.greedy:
            tokens = log_probs.argmax(-1)
        else:
            uniforms = self._uniforms.gather(1, positions.clamp(max=last)[:, None]).squeeze(1)
            tokens = draw(log_probs, uniforms.to(log_probs.device))
        tokens = self._alike(tokens)
        self.tokens.append(tokens)
        self.log_probs.append(log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        whole = (positions >= last).to(tokens.device)
        return self.ends.as_eod(tokens).masked_fill(whole, self.ends.eod)

    def responses(self, *, fill: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs [b, R] on the CPU; `fill` and 0 where the batch had ended."""
        length = self.sampling.max_response_length
        tokens = torch.full((len(self._starts), len(self.tokens) + length), fill)
        log_probs = torch.zeros(tokens.shape)
        tokens[:, : len(self.tokens)] = torch.stack(self.tokens, dim=1).cpu()
        log_probs[:, : len(self.tokens)] = torch.stack(self.log_probs, dim=1).cpu()
        columns = self._starts[:, None] + torch.arange(length)
        return tokens.gather(1, columns), log_probs.gather(1, columns)


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

    def __init__(self, chunks: nn.ModuleList, context: StaticInferenceContext, *, copies: int) -> None:
        super().__init__(chunks[0], context)
        self.chunks = chunks
        self.copies = copies

    @torch.inference_mode()
    def run_one_forward_step(
        self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        if self.inference_context.sequence_len_offset > 0:
            return super().run_one_forward_step(inference_input, recv_buffer_seq_len)
        logits = self._prefill(inference_input, recv_buffer_seq_len)
        if self.copies > 1:
            for memory in self.inference_context.key_value_memory_dict.values():
                for cache in memory:  # [s, b, groups, channels]
                    unique = cache[:, : cache.shape[1] // self.copies]
                    cache.copy_(unique.repeat_interleave(self.copies, dim=1))
        return None if logits is None else logits.repeat_interleave(self.copies, dim=0)

    def _prefill(self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None) -> Tensor | None:
        """Logits [b / copies, 1, padded V] of the rows that differ, on the last stage; fills the cache's first ones."""
        context = self.inference_context
        tokens, positions = (inference_input[name][:: self.copies] for name in ("tokens", "position_ids"))
        at_once = 1 if tokens.device.type == "cpu" else len(tokens)
        parts = []
        for begin in range(0, len(tokens), at_once):
            context.batch_size_offset, context.sequence_len_offset = begin, 0
            rows = slice(begin, begin + at_once)
            part = {**inference_input, "tokens": tokens[rows], "position_ids": positions[rows]}
            parts.append(super().run_one_forward_step(part, recv_buffer_seq_len))
        context.reset_batch_size_offset()
        return None if parts[0] is None else torch.cat(parts)

    def forward_pass_with_pipeline_parallel(
        self, inference_input: dict[str, Any], recv_buffer_seq_len: int | None = None
    ) -> Tensor | None:
        """Once round the stages for each chunk of a virtual pipeline; logits [b, s, padded V] on the last one."""
        if len(self.chunks) == 1:
            return super().forward_pass_with_pipeline_parallel(inference_input, recv_buffer_seq_len)
        rows, length = inference_input["tokens"].shape
        chunks: list[Any] = list(self.chunks)
        for i, self.model in enumerate(chunks):
            received = None
            if i or not is_pipeline_first_stage(self.pp_group):
                received = self._allocate_recv_buffer(rows, length)
                recv_from_prev_pipeline_rank_(received, self.pp_group)
            self.model.set_input_tensor(received)
            output: Tensor = self._forward(inference_input)
            if i < len(chunks) - 1 or not is_pipeline_last_stage(self.pp_group):
                send_to_next_pipeline_rank(output.to(self.pipeline_communication_dtype), self.pp_group)
        self.inference_context.increment_sequence_len_offset(length)
        return output.to(self.config.params_dtype) if is_pipeline_last_stage(self.pp_group) else None


def _common_copies(prompts: Sequence[Prompt]) -> int:
    """How often each prompt occurs in a row, if all do equally often; else 1."""
    counts = {len(list(rows)) for _, rows in groupby(prompts, key=lambda prompt: prompt.tokens)}
    return counts.pop() if len(counts) == 1 else 1
