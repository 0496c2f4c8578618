"""Q and K activations of a Hugging Face folder, run by `transformers` from local files, with forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_longact.analysis.activations.checkpoints import run_name
from megatron_longact.analysis.activations.measurement import Measurement
from megatron_longact.attention_layout import NO_CHANNEL, AttentionLayout, Projection
from megatron_longact.config import Statistic, Tap
from megatron_longact.mla_layout import MLALayout
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.reduction import STATISTICS, Accumulator
from megatron_longact.selection import QK
from megatron_longact.tasks.chat import ChatTemplate


@dataclass(frozen=True)
class LocalTokenizer:
    """One of a Hugging Face folder, or a SentencePiece file; read when it is first asked, which raises `ValueError`.

    That is for a path without a tokenizer, and for one with ids that the model has no embedding of.
    """

    path: Path
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids = list(self._loaded.encode(text))
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer {self.path} makes id {max(ids)}, but the model has {self.vocab_size} embeddings"
            )
        return ids

    def chat_template(self) -> ChatTemplate | None:
        """Its own; a SentencePiece file has none."""
        return ChatTemplate.of(self._loaded)

    @cached_property
    def _loaded(self) -> Any:
        if self.path.is_file():
            import sentencepiece

            return sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        import transformers

        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        if not any((self.path / name).is_file() for name in names):
            raise ValueError(
                f"{self.path} holds no tokenizer; give --tokenizer a folder that has one, or a SentencePiece file"
            )
        return transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)


_LATENT = "kv_a_proj_with_mqa"
"""What multi-latent attention has in place of `k_proj`."""


@dataclass
class HFSource:
    """An `AutoModelForCausalLM` whose attention has the projections of its layout; see `ModelSource`."""

    name: str
    model: Any
    tokenizer: LocalTokenizer
    layout: AttentionLayout
    attentions: list[nn.Module]
    layer_numbers: tuple[int, ...]
    taps: tuple[Tap, ...]
    inv_freq: Tensor | None
    positions: int
    embeddings: int | None = None
    rope_interleaved: bool = False

    def encode(self, text: str) -> list[int]:
        """As `ModelSource.encode`."""
        return self.tokenizer.encode(text)

    def chat_template(self) -> ChatTemplate | None:
        """As `ModelSource.chat_template`."""
        return self.tokenizer.chat_template()

    def measure(self, prompts: Sequence[Sequence[int]]) -> Measurement:
        """As `ModelSource.measure`."""
        device = next(self.model.parameters()).device
        channels = self.layout.num_q_channels + self.layout.num_k_channels
        sums = {
            (tap, name): Accumulator(len(self.attentions), channels, statistic=statistic, device=device)
            for tap in self.taps
            for name, statistic in STATISTICS.items()
        }
        with torch.no_grad(), self._hooks(sums):
            for prompt in prompts:
                self.model.base_model(torch.tensor([list(prompt)], device=device), use_cache=False)
        scores = {key: self._saliency(accumulator) for key, accumulator in sums.items()}
        return Measurement(sum(map(len, prompts)), self.layer_numbers, scores)

    def _saliency(self, accumulator: Accumulator) -> QK:
        sums = accumulator.sums  # [L, nq + nk + 1]
        values = accumulator.statistic.finish(sums[:, :-1], sums[:, -1:]).cpu()
        return QK(values[:, : self.layout.num_q_channels], values[:, self.layout.num_q_channels :])

    @contextmanager
    def _hooks(self, sums: dict[tuple[Tap, Statistic], Accumulator]) -> Iterator[None]:
        handles = []
        projections = self.layout.hf_projections
        norms = [replace(each, name=each.name.removesuffix("proj") + "norm") for each in projections]
        taps: dict[Tap, Sequence[Projection]] = {"projection": projections, "norm": norms}
        for tap in self.taps:
            accumulators = [each for (at, _), each in sums.items() if at == tap]
            for layer, attention in enumerate(self.attentions):
                for number, each in enumerate(taps[tap]):
                    hook = self._hook(accumulators, layer, each.channels, counts=number == 0)
                    handles.append(getattr(attention, each.name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, accumulators: list[Accumulator], layer: int, channels: Tensor, *, counts: bool
    ) -> Callable[..., None]:
        """channels: those that the rows of an output make, one run of them but for rows that make none."""
        rows = (channels != NO_CHANNEL).nonzero().flatten()
        first = int(channels[rows[0]])

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = _tokens_first(output, channels=len(channels))
            x = x if len(rows) == len(channels) else x[:, rows.to(x.device)]
            for accumulator in accumulators:
                accumulator.add(accumulator.sums[layer, first : first + len(rows)], x, None)
                if counts:
                    accumulator.count(slice(layer, layer + 1), x.shape[0])

        return hook


def _tokens_first(x: Tensor, *, channels: int) -> Tensor:
    """[1, t, channels], [1, t, heads, hn] or [1, heads, t, hn] -> [t, channels]."""
    if x.dim() == 4 and x.shape[2] * x.shape[3] != channels:
        x = x.transpose(1, 2)
    return x.reshape(-1, channels)


def open_folder(
    folder: Path,
    *,
    name: str | None = None,
    tokenizer: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> HFSource:
    """Load a model folder from local files.

    name: what to call it; None: as `run_name` does. tokenizer: another folder, or a SentencePiece file; None: the
    folder's own. Raises `ValueError`, in one line, for what is no model folder, and for attention without separate
    `q_proj` and `k_proj` of one size.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=getattr(torch, dtype)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    attentions = _attentions(model, folder)
    layout = _layout(attentions, model.config.get_text_config(), folder)
    norms = all(
        isinstance(getattr(each, name, None), nn.Module) for each in attentions for name in ("q_norm", "k_norm")
    )
    embeddings = int(model.get_input_embeddings().weight.shape[0])
    return HFSource(
        name=name or run_name(folder),
        model=model.to(device).eval(),
        tokenizer=LocalTokenizer(tokenizer or folder, vocab_size=embeddings),
        layout=layout,
        attentions=attentions,
        layer_numbers=tuple(_number(each, i) for i, each in enumerate(attentions)),
        taps=("projection", "norm") if norms else ("projection",),
        inv_freq=_inv_freq(model, max(section.width for section in layout.sections)),
        positions=_positions(model.config.get_text_config()),
        embeddings=embeddings,
        rope_interleaved=layout.rope_interleaved and getattr(model.config.get_text_config(), "rope_interleave", True),
    )


def _attentions(model: nn.Module, folder: Path) -> list[nn.Module]:
    kinds = (("q_proj", "k_proj"), (_LATENT, "kv_b_proj"))
    found = [
        module
        for name, module in model.named_modules()
        if "vision" not in name and any(all(hasattr(module, part) for part in parts) for parts in kinds)
    ]
    if not found:
        raise ValueError(f"{folder}: {type(model).__name__} has no attention with q_proj and k_proj of its own")
    return found


def _layout(attentions: Sequence[nn.Module], config: Any, folder: Path) -> AttentionLayout:
    layout = _latent_layout(config) if hasattr(attentions[0], _LATENT) else _plain_layout(config)
    wanted = {each.name: len(each.channels) for each in layout.hf_projections}
    for attention in attentions:
        sizes = {name: getattr(getattr(attention, name, None), "out_features", 0) for name in wanted}
        if sizes != wanted:
            found, understood = (", ".join(f"{n} of {name}" for name, n in of.items()) for of in (sizes, wanted))
            raise ValueError(f"{folder}: an attention has these rows: {found}; understood are {understood}: {layout}")
    return layout


def _plain_layout(config: Any) -> QKVLayout:
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return QKVLayout(heads, groups, int(getattr(config, "head_dim", None) or config.hidden_size // heads))


def _latent_layout(config: Any) -> MLALayout:
    return MLALayout(
        num_attention_heads=config.num_attention_heads,
        qk_head_dim=config.qk_nope_head_dim,
        qk_pos_emb_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
    )


def _positions(config: Any) -> int:
    """What the model takes; YaRN's own numbers hold where `max_position_embeddings` was left as it was before it."""
    rope = getattr(config, "rope_parameters", None) or {}
    yarn = rope.get("rope_type") == "yarn"
    scaled = (rope["factor"] or 0) * rope["original_max_position_embeddings"] if yarn else 0
    return max(int(getattr(config, "max_position_embeddings", 1 << 30)), int(scaled))


def _number(attention: nn.Module, place: int) -> int:
    return int(getattr(attention, "layer_idx", place))


def _inv_freq(model: nn.Module, hn: int) -> Tensor | None:
    """Of the first rotary embedding; one of the default kind has hn / 2 frequencies."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.numel() <= hn // 2:
            return buffer.detach().float().cpu()
    return None
