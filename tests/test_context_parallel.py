"""Context parallelism: the reduction over its ranks, and what a rank's share of a row is.

For the reduction each rank gets its part of the same activations, cut by Megatron's own function, and its rows. Whole
steps are compared in test_rl_objective.py and test_shared_prompts.py.
"""

from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from megatron_longact import LongActConfig, QKVLayout
from megatron_longact.attention_layout import ShardedLayout
from megatron_longact.megatron.attention_plan import AttentionPlan, Piece
from megatron_longact.megatron.context_parallel import RowShare
from megatron_longact.megatron.planned_attention import PlannedSeqParams, take_plans
from megatron_longact.megatron.torch_attention import Calls
from megatron_longact.reduction import STATISTICS, Accumulator
from megatron_longact.rl.batches.row_parts import row_part
from megatron_longact.selection import GlobalSaliency, ModelGroups, is_usable
from megatron_longact.tokens import TokenRules, counted_tokens, zigzag
from tests import ranks, reference
from tests.ranks import Layout

QKV = QKVLayout(4, 2, 4)
LENGTHS = (16, 9, 13)
NOT_HYBRID = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
CASES = list(product([{}, {"min_context": 12}, {"skip_first_tokens": 5}], ["mean-abs", "rms", "max-abs"]))


def activations() -> tuple[Tensor, Tensor]:
    """Activations [b, s, rows] of three padded sequences, and which tokens are real: bool [b, s]."""
    x = torch.randn(3, 16, QKV.num_rows, generator=torch.Generator().manual_seed(5))
    return x, torch.arange(16)[None] < torch.tensor(LENGTHS)[:, None]


def reduced_in_each_case() -> list[dict[str, Tensor]]:
    return [reduced(rules, statistic) for rules, statistic in CASES]


def reduced(rules: dict[str, int], statistic: Any) -> dict[str, Tensor]:
    x, real = activations()
    groups = ModelGroups.from_collection(ProcessGroupCollection.use_mpu_process_groups())
    cp_rank, cp_size = groups.cp.rank(), groups.cp.size()
    local = get_batch_on_this_cp_rank({"x": x.clone()}, **NOT_HYBRID, cp_group=groups.cp)["x"]  # [b, s / cp, rows]
    assert torch.equal(zigzag(x, cp_rank=cp_rank, cp_size=cp_size), local)
    counted = counted_tokens(
        rules=TokenRules(**rules),
        named=real,
        packed_seq_params=None,
        padding_mask=None,
        cp_rank=cp_rank,
        cp_size=cp_size,
    )
    rows = QKV.partition(groups.tp.rank(), groups.tp.size())
    config = LongActConfig(statistic=statistic)
    rows_here = QKV.rows_per_partition(groups.tp.size())
    sums = Accumulator(1, rows_here, statistic=STATISTICS[statistic], device=x.device)
    mine = local[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size(), :, rows]
    kept = counted[:, parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    mine = mine.transpose(0, 1)  # [b, s, rows] -> [sq, b, rows]
    sums.add(sums.sums[0, :rows_here], mine.flatten(0, 1), kept.flatten())
    sums.count(slice(0, 1), kept.sum())
    sharded = ShardedLayout(QKV, groups.tp.size())
    saliency = GlobalSaliency(groups, sharded, config, num_layers=1, places=[0]).from_sums(sums.sums)
    assert is_usable(saliency)
    return {"q": saliency.q[0], "k": saliency.k[0]}


@pytest.mark.parametrize(
    ("layout", "world_size"), [(Layout(cp=2), 2), (Layout(tp=2, cp=2), 4), (Layout(cp=2), 4)], ids=str
)
def test_reduction_over_context_parallel_ranks(layout: Layout, world_size: int) -> None:
    x, real = activations()
    results = ranks.run(reduced_in_each_case, layout=layout, world_size=world_size)
    for case, (rules, statistic) in enumerate(CASES):
        keep = real & (torch.arange(16) >= rules.get("skip_first_tokens", 0))
        keep &= torch.tensor([n >= rules.get("min_context", 0) for n in LENGTHS])[:, None]
        wanted = reference.saliency([x[keep]], reference.channels_of_row(4, 2, 4), statistic)
        for rank, result in enumerate(results):
            for part in ("q", "k"):
                where = f"{rules} {statistic}, rank {rank}, {part}: "
                got = result[case][part].double()
                torch.testing.assert_close(got, wanted[part], rtol=2e-6, atol=0, msg=lambda text, w=where: w + text)


def test_every_response_token_is_predicted_on_one_rank() -> None:
    """Two padded rows of 8 tokens, then the same in a packed row; of three response tokens one is padding."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    padded = torch.tensor([[6, 8, 10], [3, 5, 7]])  # in [8, 2] flattened: tokens 3, 4, 5 of row 0 and 1, 2 of row 1
    packed = torch.tensor([[3, 4, 5], [9, 10, 11]])
    for positions, bounds, rows in ((padded, [0, 8], 2), (packed, [0, 8, 16], 1)):
        found: dict[int, int] = {}
        for rank in (0, 1):
            part = row_part(positions, mask, bounds=torch.tensor(bounds), num_rows=rows, cp_rank=rank, cp_size=2)
            assert int(part.predicted[-1]) == mask.numel()
            whole = part.places[part.predicting // rows] * rows + part.predicting % rows
            mine = dict(zip(part.predicted[:-1].tolist(), whole[:-1].tolist(), strict=True))
            assert not found.keys() & mine.keys()
            found |= mine
        assert found == {i: int(p) for i, p in enumerate(positions.flatten()) if mask.flatten()[i]}


SHARED = AttentionPlan(
    (
        Piece((0, 7), ((0, 7),)),
        Piece((7, 11), ((0, 7), (7, 11))),
        Piece((11, 12), ((0, 7), (11, 12))),
        Piece((12, 16), ((12, 16),)),
    )
)


class VariableLength(nn.Module):
    """What Megatron and Transformer Engine do with a variable-length call, in plain torch."""

    cp_global_ranks, cp_stream, cp_comm_type = (0, 1), None, "p2p"

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.cp_group = group

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, kind: str) -> None:
        self.cp_group = group

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: None, **kw: Any) -> Tensor:
        packed, outputs = kw["packed_seq_params"], []
        if packed.local_cp_size == 1:
            self.set_context_parallel_group(None, None, None, self.cp_comm_type)
        assert self.cp_group is None
        assert kw["attn_mask_type"].name == "padding_causal_bottom_right"
        ends = zip(packed.cu_seqlens_q.tolist()[1:], packed.cu_seqlens_kv.tolist()[1:], strict=True)
        begins = zip(packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist(), strict=False)
        for (q0, k0), (q1, k1) in zip(begins, ends, strict=False):
            seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]).masked_fill(~seen, -torch.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k0:k1]))
        return torch.cat(outputs)


def planned_on_a_rank() -> tuple[Tensor, ...]:
    """By the hook: attention of this rank's share of a row with shared prompts, and the gradient of its keys."""
    group = parallel_state.get_context_parallel_group()
    share = RowShare([0, 16], group)
    layer = nn.ModuleDict({"core_attention": VariableLength(group)})
    take_plans([layer])
    query, key, value = (x[share.positions].requires_grad_() for x in row())
    packed = PlannedSeqParams(SHARED, device=query.device, share=share)
    output = layer["core_attention"](query, key, value, None, packed_seq_params=packed)
    assert layer["core_attention"].cp_group is group
    (output * output.detach().cos()).sum().backward()
    return share.positions, output.detach(), key.grad


def row() -> tuple[Tensor, ...]:
    return torch.randn(3, 16, 2, 8, generator=torch.Generator().manual_seed(3)).unbind()


def test_pieces_of_a_shared_row_find_their_keys_on_other_ranks() -> None:
    query, key, value = (x.requires_grad_() for x in row())
    wanted = Calls(SHARED)(query, key, value, scale=1.0)
    (wanted * wanted.detach().cos()).sum().backward()
    for positions, output, gradient in ranks.run(planned_on_a_rank, layout=Layout(cp=2), world_size=2):
        torch.testing.assert_close(output, wanted[positions].detach())
        torch.testing.assert_close(gradient, key.grad[positions])
