"""A weight that is kept as Transformer Engine's real `Float8Tensor`, on the CPU.

Nothing stands in for anything: the tensor is made of bytes and a scale, because what quantises needs a GPU. So a step
of a model in FP8 is not shown.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_longact import LongActConfig
from megatron_longact.masked_update import RowIndex, Shard, StrictFreeze, mask_gradients
from megatron_longact.qkv_layers import QKVLayer
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.refusals import check_projection
from tests import ranks

LAYOUT = QKVLayout(num_attention_heads=2, num_query_groups=1, kv_channels=16)


def float8(data: Tensor, scale_inv: float) -> Any:
    """E4M3 with one scale, of bytes [rows, width]."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    dtype = tex.DType.kFloat8E4M3
    return te.Float8Tensor(
        shape=data.shape,
        dtype=torch.bfloat16,
        data=data,
        fp8_scale_inv=torch.tensor([scale_inv]),
        fp8_dtype=dtype,
        quantizer=te.Float8CurrentScalingQuantizer(fp8_dtype=dtype, device=data.device),
    )


def found_masked_and_frozen() -> None:
    rows = LAYOUT.rows_per_partition(1)
    data = torch.arange(rows * 32, dtype=torch.int64).remainder(120).to(torch.uint8).view(rows, 32)
    attention = nn.Module()
    attention.linear_qkv = nn.Module()
    attention.linear_qkv.weight = nn.Parameter(float8(data.clone(), 0.5))
    check_projection("linear_qkv", attention.linear_qkv, LAYOUT.projections[0], 1)
    [weight] = QKVLayer(1, attention).parameters
    assert type(weight).__name__ == "Float8Tensor"

    frozen = {weight: RowIndex(torch.tensor([0, 3, rows - 1]), weight.device)}
    weight.main_grad = torch.ones(rows, 32)
    mask_gradients(frozen)
    assert weight.main_grad.sum(1).eq(0).nonzero().flatten().tolist() == [0, 3, rows - 1]

    start, end = 7, rows * 32 - 5  # as a data-parallel rank's slice cuts it
    master = nn.Parameter(torch.randn(end - start))
    before = master.detach().clone()
    inner = torch.optim.AdamW([master], lr=0.1)
    freeze = StrictFreeze([Shard(weight, start, end, lambda: [master], master)], inner, LongActConfig())
    master.grad = torch.ones_like(master)
    freeze.before_step(frozen)
    inner.step()
    freeze.after_step(frozen)
    row = torch.arange(start, end) // 32
    assert torch.equal(master == before, torch.isin(row, frozen[weight].host))
    assert torch.equal(weight._data, data)  # written by Megatron alone, whole, after the step
    assert weight._scale_inv.item() == 0.5


def test_a_weight_in_fp8_is_found_masked_and_frozen_like_any_other() -> None:
    ranks.run(found_masked_and_frozen)
