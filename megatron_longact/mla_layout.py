"""Geometry of the weights of Megatron's `MLASelfAttention`: multi-latent attention. Pure; no communication.

Q is made from the hidden state, or from a latent, by one weight, `[nope | RoPE]` a head. K without RoPE is made from a
latent, together with V: `[K | V]` a head. K's RoPE channels, which all heads share, are the last rows of the weight
that makes that latent. Down-projections are whole on every tensor-parallel rank (Transformer Engine) or cut (local).

Shape letters: np heads, dn qk_head_dim, dr qk_pos_emb_head_dim, dv v_head_dim.
Source: megatron/core/transformer/multi_latent_attention.py, `MLASelfAttention.get_query_key_value_tensors`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_longact.attention_layout import NO_CHANNEL, AttentionLayout, Projection, Section


@dataclass(frozen=True)
class MLALayout(AttentionLayout):
    """Which row of which weight makes which channel.

    Channels of Q: head by head, dn and then dr. Of K: dn of each head, then the dr that all share.
    """

    num_attention_heads: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    fused_down_projection: bool = field(default=False, compare=False)
    """Whether one weight makes both latents (`FusedMLASelfAttention`); checkpoints are alike."""
    has_biases: ClassVar[bool] = False
    rope_interleaved: ClassVar[bool] = True

    @classmethod
    def from_transformer_config(cls, config: Any, *, fused_down_projection: bool = False) -> "MLALayout":
        """That of a megatron-core `MLATransformerConfig`."""
        return cls(
            num_attention_heads=config.num_attention_heads,
            qk_head_dim=config.qk_head_dim,
            qk_pos_emb_head_dim=config.qk_pos_emb_head_dim,
            v_head_dim=config.v_head_dim,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            fused_down_projection=fused_down_projection,
        )

    def saved(self) -> dict[str, Any]:
        """All but what checkpoints are alike in."""
        return {name: value for name, value in asdict(self).items() if name != "fused_down_projection"}

    @property
    def q_sections(self) -> tuple[Section, ...]:
        """All of Q: rows of one weight, from one input."""
        width = self.qk_head_dim + self.qk_pos_emb_head_dim
        return (Section("q", self.num_attention_heads, width, self.qk_head_dim),)

    @property
    def k_sections(self) -> tuple[Section, ...]:
        """What each head has of its own, and what all share: rows of two weights, from two inputs."""
        own = Section("k", self.num_attention_heads, self.qk_head_dim, None)
        return own, Section("k-rope", 1, self.qk_pos_emb_head_dim)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """`linear_q_proj` or `linear_q_up_proj`, `linear_kv_up_proj`, and the down-projection of K's RoPE channels."""
        down = Projection("linear_kv_down_proj", self._kv_down, replicable=True)
        if self.fused_down_projection:
            assert self.q_lora_rank is not None, "Megatron fuses the down-projections of two latents"
            latent = torch.full((self.q_lora_rank,), NO_CHANNEL)
            stretches = (self.q_lora_rank, len(self._kv_down))
            down = Projection("linear_qkv_down_proj", torch.cat([latent, self._kv_down]), stretches, replicable=True)
        q = "linear_q_proj" if self.q_lora_rank is None else "linear_q_up_proj"
        return Projection(q, self._q), Projection("linear_kv_up_proj", self._kv_up), down

    @property
    def hf_projections(self) -> tuple[Projection, ...]:
        """DeepSeek's names. Rows are in Megatron's order where RoPE's pairs are neighbours (`rope_interleave`)."""
        return (
            Projection("q_proj" if self.q_lora_rank is None else "q_b_proj", self._q),
            Projection("kv_b_proj", self._kv_up),
            Projection("kv_a_proj_with_mqa", self._kv_down),
        )

    @property
    def _q(self) -> Tensor:
        return torch.arange(self.num_q_channels)

    @property
    def _kv_up(self) -> Tensor:
        heads = torch.full((self.num_attention_heads, self.qk_head_dim + self.v_head_dim), NO_CHANNEL)
        own = torch.arange(self.num_attention_heads * self.qk_head_dim).view(self.num_attention_heads, -1)
        heads[:, : self.qk_head_dim] = self.num_q_channels + own
        return heads.flatten()  # [np, dn + dv] -> [np * (dn + dv)]

    @property
    def _kv_down(self) -> Tensor:
        every = self.num_q_channels + self.num_k_channels
        shared = torch.arange(every - self.qk_pos_emb_head_dim, every)
        return torch.cat([torch.full((self.kv_lora_rank,), NO_CHANNEL), shared])
