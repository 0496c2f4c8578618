"""Q and K activations of Megatron checkpoints: the hooks and the collectives of training, at any TP, PP and EP.

One model is built, and each checkpoint is loaded into it.

Shape letters as in `saliency`: b micro-batch, s sequence.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import checkpointing
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron
from torch import Tensor, nn

from megatron_longact.analysis.activations.checkpoints import Checkpoint
from megatron_longact.analysis.activations.measurement import Measurement
from megatron_longact.attention_layout import AttentionLayout
from megatron_longact.config import LongActConfig, Tap
from megatron_longact.generation.vocabulary import check_tokenizer, embeddings_of
from megatron_longact.megatron.checkpoint_model import load_model, parse_args
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.reduction import STATISTICS
from megatron_longact.saliency import SaliencyCapture
from megatron_longact.selection import QK
from megatron_longact.tasks.chat import ChatTemplate, read_chat_template

_MULTIPLE = 16
"""Sequences are padded to a multiple of this: sequence parallelism and FP8 kernels ask for it."""


@dataclass
class MegatronSource:
    """A Megatron model, on all its ranks; see `ModelSource`. Prompts are shared among data-parallel ranks."""

    name: str
    chunks: Sequence[nn.Module]
    encode: Callable[[str], list[int]]
    positions: int
    dp_group: Any
    embeddings: int | None = None
    chat_template: Callable[[], ChatTemplate | None] = lambda: None
    layout: AttentionLayout = field(init=False)
    layer_numbers: tuple[int, ...] = field(init=False)
    taps: tuple[Tap, ...] = field(init=False)
    inv_freq: Tensor | None = field(init=False)
    rope_interleaved: bool = field(init=False)

    def __post_init__(self) -> None:
        config = get_model_config(self.chunks[0])
        self._qkv = QKVModel.find(self.chunks)
        self.layout = self._qkv.layout
        self.layer_numbers = tuple(number - 1 for number in self._qkv.layer_numbers)  # Megatron's begin at 1
        self.taps = ("projection", "norm") if config.qk_layernorm and self.layout.norms else ("projection",)
        self.inv_freq = _inv_freq(self.chunks[0], self._qkv)
        self.rope_interleaved = bool(config.rotary_interleaved) or self.layout.rope_interleaved

    def measure(self, prompts: Sequence[Sequence[int]]) -> Measurement:
        """As `ModelSource.measure`."""
        configs = [LongActConfig(tap=tap, statistic=statistic) for tap in self.taps for statistic in STATISTICS]
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad(), self._captures(configs) as captures:
            for begin in range(0, len(prompts), self.dp_group.size()):
                together = prompts[begin : begin + self.dp_group.size()]
                mine = together[self.dp_group.rank()] if self.dp_group.rank() < len(together) else ()
                self._forward(mine, captures, longest=max(map(len, together)))
            scores = {
                (config.tap, config.statistic): self._saliency(config, capture)
                for config, capture in zip(configs, captures, strict=True)
            }
        return Measurement(sum(map(len, prompts)), self.layer_numbers, scores)

    @contextmanager
    def _captures(self, configs: Sequence[LongActConfig]) -> Iterator[list[SaliencyCapture]]:
        """One capture for each, hooked on; every forward counts."""
        with ExitStack() as stack:
            captures = []
            for config in configs:
                captures.append(
                    SaliencyCapture(self._qkv, config, counts=lambda: True, clock=nullcontext(), warn=lambda _: None)
                )
                stack.callback(captures[-1].remove)
            yield captures

    def _forward(self, prompt: Sequence[int], captures: Sequence[SaliencyCapture], *, longest: int) -> None:
        """Run one prompt through all stages; an empty one counts nothing, but joins the collectives.

        longest: of the prompts that the replicas run at this time; experts that they share may want one shape.
        """
        length = max(-(-longest // _MULTIPLE), 1) * _MULTIPLE
        tokens = torch.tensor([[*prompt, *[0] * (length - len(prompt))]], dtype=torch.int64).cuda()  # [b = 1, s]
        positions = torch.arange(length).cuda()[None]
        counted = torch.arange(length).cuda()[None] < len(prompt)

        def step(batches: Any, chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            for capture in captures:
                capture.set_tokens(counted)
            return chunk(tokens, positions, None, output_processor=_no_logits), lambda output, non_loss_data: output

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(self.chunks) if len(self.chunks) > 1 else None,
            model=list(self.chunks),
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _saliency(self, config: LongActConfig, capture: SaliencyCapture) -> QK:
        saliency = self._qkv.global_saliency(config).from_sums(capture.accumulator.sums)
        return QK(saliency.q.cpu(), saliency.k.cpu())


def megatron_sources(checkpoints: Sequence[Checkpoint], flags: Sequence[str]) -> Iterator[MegatronSource]:
    """The checkpoints, all of one model, one after the other in the same memory.

    flags: Megatron's, without --load and --ckpt-step. A source is of use until the next one is asked for.
    """
    args = _arguments(checkpoints[0], flags)
    check_tokenizer(args, get_tokenizer())
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = load_model(args, groups)
    for i, checkpoint in enumerate(checkpoints):
        if i:
            args.load, args.ckpt_step = str(checkpoint.load), checkpoint.step
            checkpointing.load_checkpoint(model, None, None)
        yield MegatronSource(
            name=checkpoint.name,
            chunks=model,
            encode=_encode,
            chat_template=lambda: ChatTemplate.of(get_tokenizer(), given=read_chat_template(args.chat_template)),
            positions=int(args.max_position_embeddings),
            dp_group=groups.dp,
            embeddings=embeddings_of(args),
        )


def _arguments(checkpoint: Checkpoint, flags: Sequence[str]) -> Namespace:
    sys.argv[1:] = [*flags, "--load", str(checkpoint.load)]
    sys.argv += [] if checkpoint.step is None else ["--ckpt-step", str(checkpoint.step)]
    args = parse_args()
    refused = {
        "--context-parallel-size": args.context_parallel_size > 1,
        "--num-layers-per-virtual-pipeline-stage": args.virtual_pipeline_model_parallel_size is not None,
    }
    for flag, given in refused.items():
        if given:
            raise ValueError(f"this does not work with {flag}; tensor, sequence and pipeline parallelism would")
    return args


def _encode(text: str) -> list[int]:
    return list(get_tokenizer().tokenize(text))


def _no_logits(*, hidden_states: Tensor, **unused: Any) -> Tensor:
    """What the last stage returns instead of logits over the vocabulary."""
    return hidden_states.new_zeros(1)


def _inv_freq(chunk: nn.Module, model: QKVModel) -> Tensor | None:
    """What a token turns, fp32 [pairs]; a scaled RoPE's `inv_freq` need not say it: its row for position 1 does."""
    try:
        rope = get_attr_wrapped_model(chunk, "rotary_pos_emb", allow_none=False)
    except RuntimeError:
        rope = next((getattr(layer.attention, "rotary_pos_emb", None) for layer in model.layers), None)
        if rope is None:
            return None
    angles: Tensor | tuple[Tensor, float] = rope.get_emb(2)  # [positions, 1, 1, 2 pairs]; YaRN's with its mscale
    turned = (angles if isinstance(angles, Tensor) else angles[0])[1, 0, 0].detach().float().cpu()
    return turned[::2] if rope.rotary_interleaved else turned[: len(turned) // 2]
