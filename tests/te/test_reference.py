"""The reference of a KL penalty on Transformer Engine's real FP8 tensors, made of bytes: quantising needs a GPU.

What Megatron's step does to them is written out: data and scales rewritten in place.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import ranks

pytest.importorskip("transformer_engine", reason="NOT RUN: Transformer Engine is not here")

ROWS, WIDTH = 128, 256
KINDS = ["delayed", "tensorwise", "blockwise", "mxfp8"]


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 100, shape, dtype=torch.uint8)


def quantized(kind: str) -> Tensor:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor, mxfp8_tensor

    fp8 = tex.DType.kFloat8E4M3
    common: dict[str, Any] = {
        "shape": (ROWS, WIDTH),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "fp8_dtype": fp8,
    }
    if kind in ("delayed", "tensorwise"):
        scales = {"scale": torch.ones(1), "amax": torch.zeros(1)}
        delayed = float8_tensor.Float8Quantizer(fp8_dtype=fp8, **scales)
        current = float8_tensor.Float8CurrentScalingQuantizer(fp8_dtype=fp8, device=torch.device("cpu"))
        data = random_bytes(ROWS, WIDTH)
        return float8_tensor.Float8Tensor(
            **common,
            data=data,
            data_transpose=data.t().contiguous(),
            fp8_scale_inv=torch.tensor([0.5]),
            quantizer=delayed if kind == "delayed" else current,
        )
    if kind == "blockwise":
        quantizer = float8_blockwise_tensor.Float8BlockQuantizer(fp8_dtype=fp8, rowwise=True, columnwise=True)
        return float8_blockwise_tensor.Float8BlockwiseQTensor(
            **common,
            rowwise_data=random_bytes(ROWS, WIDTH),
            rowwise_scale_inv=torch.rand(ROWS // 128, WIDTH // 128),
            columnwise_data=random_bytes(WIDTH, ROWS),
            columnwise_scale_inv=torch.rand(WIDTH // 128, ROWS // 128),
            quantizer=quantizer,
            is_2D_scaled=True,
        )
    return mxfp8_tensor.MXFP8Tensor(
        **common,
        rowwise_data=random_bytes(ROWS, WIDTH),
        rowwise_scale_inv=random_bytes(ROWS, WIDTH // 32),
        columnwise_data=random_bytes(ROWS, WIDTH),
        columnwise_scale_inv=random_bytes(ROWS // 32, WIDTH),
        quantizer=mxfp8_tensor.MXFP8Quantizer(fp8_dtype=fp8),
    )


def inner(weight: Any) -> dict[str, Tensor]:
    return {name: part for name, part in weight.get_metadata().items() if isinstance(part, Tensor)}


def bits(weight: Any) -> dict[str, Tensor]:
    flag = torch.tensor(getattr(weight, "_transpose_invalid", False))
    return {"invalid": flag, **{name: part.clone() for name, part in inner(weight).items()}}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(part, other[name]) for name, part in one.items())


def swap_quantized_weights(kind: str, offload: bool) -> dict[str, Any]:
    from megatron_longact.rl.reference import ReferenceWeights

    model = nn.Module()
    model.weight = nn.Parameter(quantized(kind), requires_grad=True)
    weight, seen = model.weight, {"class": type(model.weight).__name__, "swapped": [], "after": [], "moved": []}
    start, places = bits(weight), {name: part.data_ptr() for name, part in inner(weight).items()}
    reference = ReferenceWeights([model], offload=offload)
    for step in range(3):
        for part in inner(weight).values():
            part.copy_(random_bytes(*part.shape) if part.dtype == torch.uint8 else torch.rand(part.shape))
        if kind in ("delayed", "tensorwise"):
            weight._transpose_invalid = step == 1
        own = bits(weight)
        seen["moved"].append(not same(own, start))
        with reference.swapped_in():
            seen["swapped"].append(same(bits(weight), start))
            if step == 2 and hasattr(weight, "remove_caches"):
                weight.remove_caches()
        seen["after"].append(same(bits(weight), own))
    seen["same places"] = places == {name: part.data_ptr() for name, part in inner(weight).items()}
    return seen


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_what_the_weight_was(kind: str, offload: bool) -> None:
    [seen] = ranks.run(swap_quantized_weights, kind=kind, offload=offload)
    assert seen["class"] in ("Float8Tensor", "Float8BlockwiseQTensor", "MXFP8Tensor")
    for case in ("moved", "swapped", "after"):
        assert seen[case] == [True] * 3, case
    assert seen["same places"]
