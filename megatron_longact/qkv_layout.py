"""Geometry of the fused QKV weight of Megatron's `SelfAttention.linear_qkv`. Pure; no communication.

One query group of the weight's rows is `[Q heads of the group | (gate heads) | K | V]`; groups follow one
another, and a tensor-parallel shard is a contiguous chunk of rows, so with `num_query_groups < TP` it can
begin inside a group.

Shape letters (Megatron's): np query heads, ng query groups, hn kv_channels, h hidden size.
Source: megatron/core/transformer/attention.py, `SelfAttention.get_query_key_value_tensors`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_longact.attention_layout import NO_CHANNEL, AttentionLayout, Projection, Section, runs


@dataclass(frozen=True)
class QKVLayout(AttentionLayout):
    """Which row of the fused QKV weight produces which channel of which head.

    Channel c of Q is head `c // hn`, index `c % hn`; of K likewise, by group. Raises `ValueError` on sizes that
    Megatron would not accept either.
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    attention_output_gate: bool = False
    norms: ClassVar[tuple[str, ...]] = ("q_layernorm", "k_layernorm")

    def __post_init__(self) -> None:
        sizes = (self.num_attention_heads, self.num_query_groups, self.kv_channels)
        if min(sizes) < 1 or self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={sizes[0]}, num_query_groups={sizes[1]}, kv_channels={sizes[2]}: "
                "all must be positive and the heads a multiple of the groups"
            )

    @classmethod
    def from_transformer_config(cls, config: Any) -> "QKVLayout":
        """The layout that a megatron-core `TransformerConfig` gives `linear_qkv`."""
        return cls(
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.kv_channels,
            attention_output_gate=bool(getattr(config, "attention_output_gate", False)),
        )

    @property
    def heads_per_group(self) -> int:
        """Query heads of one group, np / ng."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def rows_per_group(self) -> int:
        """Rows of one group: (np / ng, twice with a gate, + K + V) * hn."""
        query_parts = 2 if self.attention_output_gate else 1
        return (query_parts * self.heads_per_group + 2) * self.kv_channels

    @property
    def num_rows(self) -> int:
        """Rows of the whole fused weight."""
        return self.num_query_groups * self.rows_per_group

    @property
    def q_sections(self) -> tuple[Section, ...]:
        """All query heads."""
        return (Section("q", self.num_attention_heads, self.kv_channels),)

    @property
    def k_sections(self) -> tuple[Section, ...]:
        """All groups."""
        return (Section("k", self.num_query_groups, self.kv_channels),)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """`linear_qkv` alone."""
        channels = torch.full((self.num_rows,), NO_CHANNEL)
        rows = torch.cat([self.q_rows, self.k_rows])
        channels[rows] = torch.arange(len(rows))
        return (Projection("linear_qkv", channels),)

    @property
    def hf_projections(self) -> tuple[Projection, ...]:
        """`q_proj` and `k_proj`, head by head."""
        q, k = torch.arange(self.num_q_channels + self.num_k_channels).split([self.num_q_channels, self.num_k_channels])
        return Projection("q_proj", q), Projection("k_proj", k)

    @property
    def hf_mapped(self) -> bool:
        """Not with a gate, whose heads Hugging Face puts between those of Q."""
        return not self.attention_output_gate

    def norm_channels(self, tp_rank: int, tp_size: int) -> list[Tensor]:
        """Those of a rank's heads; with ng < tp neighbouring ranks have the same group of K."""
        q, k = (projection.channels for projection in self.hf_projections)
        groups = max(self.num_query_groups // tp_size, 1)
        first = tp_rank * self.num_query_groups // tp_size
        return [q.chunk(tp_size)[tp_rank], k[first * self.kv_channels :][: groups * self.kv_channels]]

    @property
    def q_rows(self) -> Tensor:
        """Fused row of each Q channel; int64 [np * hn]."""
        return self._rows_of_part(0, self.heads_per_group)

    @property
    def gate_rows(self) -> Tensor:
        """Fused row of each channel of the attention output gate; int64 [np * hn], or empty."""
        if not self.attention_output_gate:
            return torch.empty(0, dtype=torch.int64)
        return self._rows_of_part(self.heads_per_group, self.heads_per_group)

    @property
    def k_rows(self) -> Tensor:
        """Fused row of each K channel; int64 [ng * hn]."""
        return self._rows_of_part(self.rows_per_group // self.kv_channels - 2, 1)

    @property
    def v_rows(self) -> Tensor:
        """Fused row of each V channel; int64 [ng * hn]."""
        return self._rows_of_part(self.rows_per_group // self.kv_channels - 1, 1)

    def _rows_of_part(self, first_head: int, num_heads: int) -> Tensor:
        groups = torch.arange(self.num_query_groups) * self.rows_per_group
        part = torch.arange(num_heads * self.kv_channels) + first_head * self.kv_channels
        return (groups[:, None] + part[None, :]).flatten()  # [ng, heads * hn] -> [ng * heads * hn]

    def rows_per_partition(self, tp_size: int) -> int:
        """Rows of one tensor-parallel shard."""
        if self.num_rows % tp_size:
            raise ValueError(f"{self.num_rows} fused QKV rows do not divide by tensor parallel size {tp_size}")
        return self.num_rows // tp_size

    def partition(self, tp_rank: int, tp_size: int) -> slice:
        """The global fused rows that tensor-parallel rank `tp_rank` holds."""
        rows = self.rows_per_partition(tp_size)
        return slice(tp_rank * rows, (tp_rank + 1) * rows)

    def local_qk_ranges(self, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
        """The local rows that are Q or K as [start, end) ranges, ascending, none touching the next."""
        return runs(self.projections[0].shard(tp_rank, tp_size) != NO_CHANNEL)

    def fused(self, q: Tensor, k: Tensor, *, fill: bool | float) -> Tensor:
        """Values of channels, Q [..., np*hn] and K [..., ng*hn], as values of fused rows [..., num_rows].

        All other rows (gate, V) get `fill`. Same dtype and device as `q`.
        """
        rows = torch.full((*q.shape[:-1], self.num_rows), fill, dtype=q.dtype, device=q.device)
        rows[..., self.q_rows.to(q.device)] = q
        rows[..., self.k_rows.to(q.device)] = k
        return rows
