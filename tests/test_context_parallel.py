"""Context parallelism: the reduction alone, since attention under it needs Transformer Engine.

Each rank gets its part of the same activations, cut by Megatron's own function, and its rows.
"""

from inspect import signature
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_longact import LongActConfig, QKVLayout
from megatron_longact.reduction import STATISTICS, Accumulator
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
    saliency = GlobalSaliency(groups, QKV, config, layer_numbers=[1], local_layers=[1]).from_sums(sums.sums)
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
