"""QKVLayout against Megatron's own split of a fused row, written out naively."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longact import QKVLayout

LAYOUTS = st.builds(
    lambda groups, per_group, hn, gate: QKVLayout(groups * per_group, groups, hn, attention_output_gate=gate),
    groups=st.integers(1, 8),
    per_group=st.integers(1, 6),
    hn=st.integers(1, 5),
    gate=st.booleans(),
)


def naive_rows(layout: QKVLayout) -> dict[tuple[str, int, int], int]:
    """(part, head or group, channel) -> fused row, by walking the rows in Megatron's order."""
    rows, row = {}, 0
    for group in range(layout.num_query_groups):
        heads = range(group * layout.heads_per_group, (group + 1) * layout.heads_per_group)
        parts = [("q", head) for head in heads]
        parts += [("gate", head) for head in heads] if layout.attention_output_gate else []
        for part, head in [*parts, ("k", group), ("v", group)]:
            for channel in range(layout.kv_channels):
                rows[part, head, channel] = row
                row += 1
    return rows


@given(LAYOUTS)
def test_rows_are_megatrons_order(layout: QKVLayout) -> None:
    naive = naive_rows(layout)
    for part, rows in (("q", layout.q_rows), ("gate", layout.gate_rows), ("k", layout.k_rows), ("v", layout.v_rows)):
        for index, row in enumerate(rows.tolist()):
            head, channel = divmod(index, layout.kv_channels)
            assert naive[part, head, channel] == row


@given(LAYOUTS)
def test_parts_are_a_bijection_onto_the_rows(layout: QKVLayout) -> None:
    rows = torch.cat([layout.q_rows, layout.gate_rows, layout.k_rows, layout.v_rows])
    assert rows.sort().values.tolist() == list(range(layout.num_rows))


@given(LAYOUTS, st.sampled_from([1, 2, 4, 8]))
def test_shards_put_together_are_the_whole(layout: QKVLayout, tp_size: int) -> None:
    if layout.num_rows % tp_size:
        with pytest.raises(ValueError, match="do not divide by tensor parallel size"):
            layout.partition(0, tp_size)
        return
    q = torch.rand(layout.num_q_channels) < 0.3
    k = torch.rand(layout.num_k_channels) < 0.3
    whole = layout.fused(q, k, fill=False)
    shards = torch.cat([whole[layout.partition(rank, tp_size)] for rank in range(tp_size)])
    assert torch.equal(shards, whole)
    assert torch.equal(shards[layout.q_rows], q)
    assert torch.equal(shards[layout.k_rows], k)
    assert not shards[layout.v_rows].any()
    assert not shards[layout.gate_rows].any()
    local = [
        rank * layout.rows_per_partition(tp_size) + row
        for rank in range(tp_size)
        for start, end in layout.local_qk_ranges(rank, tp_size)
        for row in range(start, end)
    ]
    assert local == torch.cat([layout.q_rows, layout.k_rows]).sort().values.tolist()


def test_a_shard_can_begin_inside_a_group() -> None:
    layout = QKVLayout(4, 1, 2)  # rows: 8 Q, 2 K, 2 V; TP 4 has 3 rows a rank
    assert layout.local_qk_ranges(0, 4) == [(0, 3)]
    assert layout.local_qk_ranges(2, 4) == [(0, 3)]
    assert layout.local_qk_ranges(3, 4) == [(0, 1)]


@pytest.mark.parametrize("sizes", [(4, 3, 8), (0, 1, 8), (4, 2, 0)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiple of the groups"):
        QKVLayout(*sizes)
