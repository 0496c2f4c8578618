"""Responses from megatron-core's dynamic inference engine: paged KV cache, continuous batching, CUDA graphs.

The GPU counterpart of `StaticRolloutEngine`, under the same protocol: all ranks call `generate` together, between two
training steps, with the very model that is being trained. Its attention needs flash-attn: on the CPU the tests run the
real engine with plain torch in place of the attention kernels, on a GPU tests/gpu/test_dynamic_rollout.py with those
kernels and CUDA graphs. FP8 has not run.
Shapes: n responses, m of them on this replica, R response tokens, b requests of one engine step, V vocabulary.

What the engine does behind one's back (megatron-core 0.19) and what is done about it here:

- it puts the process into `InferenceMode`, fills RoPE caches with tensors of `torch.inference_mode`, leaves `eval()`
  on: `generation_mode` of engine.py undoes all of it;
- one generator a replica, seeded by data-parallel rank, serves all requests in the order in which they happen to be
  batched; log-probs are taken in the logits' dtype; top-k and top-p exclude each other; every rank of a replica samples
  for itself, and ranks that disagree once hang: `_Draws` takes the place of its sampling kernels, draws each token from
  the numbers of (seed, step, prompt, sample, position), and the replica's first rank draws for all;
- the token of a prompt that is prefilled only in part is a throw-away: it is not kept;
- paused requests go on later, evicted ones are prefilled again with what they had: the position decides, so the same
  numbers are used;
- a response that would not fit is cut short, one whose prompt is too long fails, both with no more than a warning:
  refused before anything is generated;
- the prefix cache and suspended requests outlive `suspend` and would be used with newer weights: `reset` every time;
- the KV cache stays on the GPU during training, unless `--rl-kv-cache-management-mode recompute` gives its memory back
  (and the CUDA graphs with it, captured anew each time); `offload` would keep a cache of old weights and is refused;
- `--cuda-graph-impl local` would also capture training forwards, whose replay runs no hook: the graph managers are off
  the model while it trains. They read weights where they lie, so updates in place are seen;
- finished requests are turned into text: not here;
- with FP8 it wraps TE's linear layers for good, so that they pad: they stay wrapped.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from megatron.core.inference.config import AsyncScheduleMode, InferenceConfig, KVCacheManagementMode
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.inference_request import Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling import Sampling as SamplingKernels
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.transformer import attention
from megatron.core.transformer.utils import toggle_cuda_graphs
from megatron.training.argument_utils import inference_cfg_from_args
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_longact.generation.engine import (
    Ends,
    Prompt,
    Replicas,
    Rollouts,
    generation_mode,
    replicas_share_experts,
)
from megatron_longact.generation.sampling import Sampling, draw, sampled_log_probs, uniform_numbers
from megatron_longact.generation.whole_sequences import whole_sequences

ROWS_AT_ONCE = 64
"""Requests whose distribution is written out together: bounds sampling's memory to so many fp64 [V]."""


def inference_config_from_args(args: Namespace, model: nn.Module, *, longest: int | None = None) -> InferenceConfig:
    """The engine's configuration from Megatron's own `--inference-*`, `--rl-kv-cache-*` and CUDA graph flags.

    longest: tokens of a sequence at most; None for `--seq-length`. Raises ValueError for `--rl-training-cuda-graphs`.
    """
    if args.rl_training_cuda_graphs:
        raise ValueError(
            "the RL program does not work with --rl-training-cuda-graphs: a replayed forward runs no hook; "
            "--cuda-graph-impl local alone uses graphs for rollouts only"
        )
    config = inference_cfg_from_args(args).to_inference_config(
        model,
        kv_cache_management_mode=args.rl_kv_cache_management_mode,
        static_kv_memory_pointers=args.rl_persist_cuda_graphs,
        enable_cuda_graphs=args.cuda_graph_impl == "local",
        verbose=False,
    )
    return replace(config, max_sequence_length=longest or args.seq_length)


def check_step(longest: int, *, max_tokens: int | None, chunked: bool) -> None:
    """Raise `ValueError` for a prompt that one step of the engine does not take; max_tokens: None for its default."""
    most = max_tokens or DynamicInferenceContext.DEFAULT_MAX_TOKENS
    if longest > most and not chunked:
        raise ValueError(
            f"a prompt of {longest} tokens is longer than one step of the inference engine, {most} tokens: "
            "raise --inference-dynamic-batching-max-tokens or give --enable-chunked-prefill"
        )


class DynamicRolloutEngine:
    """Rollouts by `DynamicInferenceEngine`, at the model's own TP and PP size, sequence parallel or not.

    model: the unwrapped GPTModel; config: see `inference_config_from_args`; eod, stop_ids, vocab_size: as those of
    `StaticRolloutEngine`; dp_group: ranks that share the prompts among them; mp_group: the tensor and pipeline parallel
    ranks that are one replica. Raises ValueError for what cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        config: InferenceConfig,
        eod: int,
        vocab_size: int,
        dp_group: ProcessGroup,
        mp_group: ProcessGroup,
        stop_ids: Sequence[int] = (),
    ) -> None:
        model_config: Any = model.config
        _check(config, model_config)
        self.model = model
        self.eod = eod
        self.ends = Ends(eod, stop_ids)
        self.vocab_size = vocab_size
        self.replicas = Replicas(dp_group)
        self.mp_group = mp_group
        # sampling kernels of its own would be captured into CUDA graphs
        self._config = replace(config, sampling_backend="torch", materialize_only_last_token_logits=True)
        self._engine: DynamicInferenceEngine | None = None
        self._has_cuda_graphs = model_config.cuda_graph_impl == "local"
        if self._has_cuda_graphs:
            toggle_cuda_graphs(model, set_to="none")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollouts:
        """See `RolloutEngine`; the model's mode and all generators are kept.

        Raises ValueError, on all ranks and before anything is generated, if a sequence cannot fit.
        """
        self._check_lengths(prompts, sampling)
        own = spread(
            prompts,
            replicas=self.replicas.count,
            response_length=sampling.max_response_length,
            together=self._config.enable_prefix_caching,
        )[self.replicas.index]
        tokens = torch.zeros(len(prompts), sampling.max_response_length, dtype=torch.int64)
        log_probs = torch.zeros_like(tokens, dtype=torch.float32)
        whole = whole_sequences(self.model, keep_sequence_parallel=True)
        with self._cuda_graphs(), generation_mode(self.model), whole, self._awake() as engine:
            self._check_blocks(engine.context, prompts, sampling)
            if own:
                tokens[own], log_probs[own] = self._run(engine, [prompts[row] for row in own], sampling)
        return self.ends.cut(*self.replicas.gathered(tokens, log_probs))

    @contextmanager
    def _awake(self) -> Iterator[DynamicInferenceEngine]:
        """The engine, empty and with its buffers allocated; afterwards it is empty and suspended again."""
        if self._engine is None:
            context = DynamicInferenceContext(self.model.config, self._config)
            controller = _Controller(GPTInferenceWrapper(self.model, context), None)
            self._engine = DynamicInferenceEngine(controller, context)
        else:
            self._engine.resume()
            self._engine.reset()
        try:
            yield self._engine
        finally:
            self._engine.reset()
            self._engine.suspend()

    def _run(
        self, engine: DynamicInferenceEngine, prompts: Sequence[Prompt], sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs [m, R] on the CPU; what lies behind a response's end is undefined."""
        draws = _Draws(prompts, sampling, vocab_size=self.vocab_size, ends=self.ends, mp_group=self.mp_group)
        engine.controller.sample_with(draws)
        params = SamplingParams(num_tokens_to_generate=sampling.max_response_length, termination_id=self.eod)
        for i, prompt in enumerate(prompts):
            engine.add_request(i, list(prompt.tokens), params)
        records: list[Any] = []
        while engine.has_unfinished_requests():
            records += engine.step_modern()["finished_request_records"]
        completed = [record for record in records if record[-1].status == Status.COMPLETED]
        if len(completed) != len(prompts):
            raise RuntimeError(f"the inference engine completed {len(completed)} of {len(prompts)} responses")
        return draws.results()

    @contextmanager
    def _cuda_graphs(self) -> Iterator[None]:
        """Graph managers on the model inside the block, if it was built with them."""
        if not self._has_cuda_graphs:
            yield
            return
        toggle_cuda_graphs(self.model, set_to="local")
        try:
            yield
        finally:
            toggle_cuda_graphs(self.model, set_to="none")

    def _check_lengths(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        needed, most = longest + sampling.max_response_length, self._config.max_sequence_length
        if needed > most:
            raise ValueError(
                f"a prompt of {longest} tokens plus a response of {sampling.max_response_length} needs {needed} "
                f"positions, but the inference engine was made for {most} (--seq-length)"
            )
        check_step(longest, max_tokens=self._config.max_tokens, chunked=self._config.enable_chunked_prefill)

    def _check_blocks(self, context: DynamicInferenceContext, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        longest = max((len(prompt.tokens) for prompt in prompts), default=0) + sampling.max_response_length
        needed = math.ceil(longest / context.block_size_tokens)
        most = context.kv_block_allocator.active_count
        if needed > most:
            raise ValueError(
                f"a sequence of {longest} tokens needs {needed} blocks of the KV cache, which has {most}: raise "
                "--inference-dynamic-batching-buffer-size-gb"
            )


def spread(prompts: Sequence[Prompt], *, replicas: int, response_length: int, together: bool) -> list[list[int]]:
    """Rows of each replica, the longest first: each piece goes to the replica with the fewest tokens so far.

    A piece is one row or, `together`, the rows of equal prompts, which are then adjacent and counted as prefilled once;
    pieces never exceed a replica's share of the rows. Pure, so that all ranks agree.
    """
    pieces = [[row] for row in range(len(prompts))]
    if together:
        order = sorted(range(len(prompts)), key=lambda row: (prompts[row].tokens, row))
        share = math.ceil(len(prompts) / replicas)
        groups = (list(rows) for _, rows in groupby(order, key=lambda row: prompts[row].tokens))
        pieces = [group[i : i + share] for group in groups for i in range(0, len(group), share)]

    def tokens(piece: list[int]) -> int:
        return len(prompts[piece[0]].tokens) + len(piece) * response_length

    rows: list[list[int]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for piece in sorted(pieces, key=lambda piece: (-tokens(piece), piece)):
        least = loads.index(min(loads))
        rows[least] += piece
        loads[least] += tokens(piece)
    return rows


class _Controller(TextGenerationController):
    """The engine's step with our sampling in it, and without turning tokens into text."""

    def sample_with(self, draws: _Draws) -> None:
        self._sampling = draws

    @staticmethod
    def detokenize(*args: Any, **kwargs: Any) -> str:
        return ""


class _Draws(SamplingKernels):
    """Draws the tokens of requests 0 to m − 1 and keeps them, with their log-probs, by request and position."""

    def __init__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, vocab_size: int, ends: Ends, mp_group: ProcessGroup
    ) -> None:
        count, device = sampling.max_response_length, torch.cuda.current_device()
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._ends = ends
        self._mp_group = mp_group
        self._prompt_lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        self._tokens = torch.zeros(len(prompts), count, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(len(prompts), count, dtype=torch.float32, device=device)
        numbers = [uniform_numbers(sampling.seed, sampling.step, p.index, p.sample, count=count) for p in prompts]
        self._uniforms = torch.from_numpy(np.stack(numbers)).to(device)

    def sample_kernel(
        self, logits: Tensor, n: int, context: DynamicInferenceContext, *, output: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The next token [n] of each active request, from logits [≥ n, padded V], also written to `output`.

        The engine, which knows one end, is given that one for each.
        """
        logits = logits[:n]  # one row a request: the engine is told to make no others
        requests = context.request_ids[context.paused_request_count : context.total_request_count].long()
        positions = context.get_active_sequence_lengths() - self._prompt_lengths[requests]
        whole = (requests != context.chunked_prefill_request_id).nonzero().squeeze(-1).to(logits.device)
        requests, positions = requests.to(logits.device), positions.clamp(min=0).to(logits.device)
        tokens, log_probs = self._draw(logits, self._uniforms[requests, positions])
        if self._mp_group.size() > 1:
            torch.distributed.broadcast(tokens, group=self._mp_group, group_src=0)
        self._tokens[requests[whole], positions[whole]] = tokens[whole]
        self._log_probs[requests[whole], positions[whole]] = log_probs[whole]
        seen = self._ends.as_eod(tokens)
        return seen if output is None else output.copy_(seen)

    def log_probs_kernel(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never asked for: the requests want no log-probs of the engine."""
        raise NotImplementedError

    def results(self) -> tuple[Tensor, Tensor]:
        """Tokens int64 and log-probs fp32 [m, R] on the CPU, the same on all ranks of the replica."""
        if self._mp_group.size() > 1:
            torch.distributed.broadcast(self._log_probs, group=self._mp_group, group_src=0)
        return self._tokens.cpu(), self._log_probs.cpu()

    def _draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probs [b] from logits [b, padded V] and uniform numbers [b]."""
        tokens, log_probs = [], []
        for rows, numbers in zip(logits.split(ROWS_AT_ONCE), uniforms.split(ROWS_AT_ONCE), strict=True):
            all_log_probs = sampled_log_probs(rows[:, : self._vocab_size], sampling=self._sampling)
            drawn = all_log_probs.argmax(-1) if self._sampling.greedy else draw(all_log_probs, numbers)
            tokens.append(drawn)
            log_probs.append(all_log_probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1))
        return torch.cat(tokens), torch.cat(log_probs)


def _check(config: InferenceConfig, model_config: Any) -> None:
    """Raise ValueError, by the flag's name, for what this engine cannot do or finds no kernels for."""
    refused = {
        "--num-speculative-tokens": (config.num_speculative_tokens > 0, "one token a request is drawn at a time"),
        "--inference-dynamic-batching-async-sched-mode async": (
            config.async_sched_mode != AsyncScheduleMode.LEGACY,
            "its steps sample after the batch has changed",
        ),
        "--rl-kv-cache-management-mode offload": (
            config.kv_cache_management_mode == KVCacheManagementMode.OFFLOAD,
            "it would keep a cache of old weights; choose persist or recompute",
        ),
        "--cuda-graph-impl local and --fp8-format without --fp8-param-gather": (
            model_config.cuda_graph_impl == "local" and bool(model_config.fp8) and not model_config.fp8_param,
            "its graphs would replay the weights as they were quantised when they were captured",
        ),
        "--expert-model-parallel-size, or more of --expert-tensor-parallel-size than of tensor parallelism": (
            replicas_share_experts(model_config),
            "a replica that has finished would leave the others waiting for its experts; the static one keeps step",
        ),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ValueError(f"the dynamic inference engine does not work with {flag}: {reason}")
    _check_multiples(config, tp_size=model_config.tensor_model_parallel_size)
    if not _has_kernels():
        raise ValueError(
            "the dynamic inference engine needs flash-attn 2.7.3 or newer, and einops; without them leave "
            "--inference-dynamic-batching out"
        )


def _check_multiples(config: InferenceConfig, *, tp_size: int) -> None:
    """Raise ValueError for bounds that Megatron would assert on, now or in a full step."""
    requests, tokens = config.max_requests, config.max_tokens
    if requests is not None and requests % tp_size:
        raise ValueError(
            f"--inference-dynamic-batching-max-requests is {requests}; it must be a multiple of the tensor parallel "
            f"size {tp_size}"
        )
    if tokens is not None and tokens != (up := DynamicInferenceContext.round_up_tokens(tokens, tp_size)):
        raise ValueError(
            f"--inference-dynamic-batching-max-tokens is {tokens}; steps are padded to a multiple, choose {up}"
        )


def _has_kernels() -> bool:
    """Whether Megatron's attention finds what its dynamic batching calls."""
    if attention.rearrange is None:
        return False
    if attention.HAVE_FA4 or attention.HAVE_FA3:
        return True
    try:
        return attention.is_fa_min_version("2.7.3")
    except ImportError:
        return False
