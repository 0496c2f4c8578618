"""The CPU mode's attention: torch's own, whole or in pieces, gives what Megatron's unfused one gives."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_longact.megatron.attention_plan import AttentionPlan, Piece, of_sequences
from megatron_longact.megatron.planned_attention import PlannedSeqParams, rope_by_position, take_plans
from megatron_longact.megatron.torch_attention import Calls
from tests import ranks

NP, NG, HN = 4, 2, 8
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
"""fp32: the softmax is taken block by block, and products are summed in another order."""

SHARED = AttentionPlan(
    (
        Piece((0, 9), ((0, 9),)),
        Piece((9, 12), ((0, 9), (9, 12))),
        Piece((12, 16), ((0, 9), (12, 16))),
        Piece((16, 17), ((0, 9), (16, 17))),
        Piece((17, 37), ((17, 37),)),
        Piece((37, 77), ((17, 37), (37, 77))),
        Piece((77, 157), ((17, 37), (77, 157))),
        Piece((157, 160), ((157, 160),)),
    )
)
"""Two prompts with their responses in one row, and padding."""


def tensors(tq: int, tk: int, *batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(tq, *batch, NP, HN), (tk, *batch, NG, HN), (tk, *batch, NG, HN)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def naive(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query by query: what each sees, written out."""
    key, value = (x.repeat_interleave(NP // NG, 1) for x in (key, value))
    rows = []
    for piece in plan.pieces:
        for i in range(piece.num_queries):
            seen = [t for span in piece.keys for t in range(*span)][: piece.num_keys - piece.num_queries + i + 1]
            scores = torch.einsum("nh,snh->ns", query[piece.queries[0] + i], key[seen]) * HN**-0.5
            rows.append(torch.einsum("ns,snh->nh", scores.softmax(-1), value[seen]))
    return torch.stack(rows)


def compare(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    got, wanted = (
        [output, *torch.autograd.grad(output, inputs, torch.cos(torch.arange(output.numel()).view_as(output) * 1.0))]
        for output in outputs
    )
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE)


@pytest.mark.parametrize(
    "plan",
    [
        SHARED,
        of_sequences([0, 7, 7, 8, 40, 73, 80]),
        SHARED.of([(0, 40), (120, 160)]),  # context-parallel ranks of two
        SHARED.of([(40, 120)]),
    ],
    ids=["shared prompts", "sequences", "cp rank 0", "cp rank 1"],
)
def test_a_plan_is_what_each_query_sees(plan: AttentionPlan) -> None:
    query, key, value = tensors(plan.num_queries, 160)
    output = Calls(plan)(query, key, value, scale=HN**-0.5)
    compare([output, naive(plan, query, key, value)], [query, key, value])


def test_calls_are_few_and_little_of_them_is_wasted() -> None:
    def shapes(plan: AttentionPlan) -> list[tuple[int, ...]]:
        return [(*call.queries.shape, call.keys.shape[1]) for call in Calls(plan).calls]

    assert shapes(SHARED) == [(3, 20, 20), (1, 8, 17), (1, 120, 140)]
    assert shapes(of_sequences(range(0, 1001, 10))) == [(100, 10, 10)]
    assert shapes(of_sequences([0, 1000, 1500])) == [(1, 1000, 1000), (1, 500, 500)]
    long = [Piece((0, 100), ((0, 100),))]
    long += [Piece((begin, begin + 400), ((0, 100), (begin, begin + 400))) for begin in (100, 500, 900)]
    assert shapes(AttentionPlan(tuple(long))) == [(1, 100, 100)] + [(1, 400, 500)] * 3


def test_a_plan_says_what_a_variable_length_call_takes() -> None:
    queries, keys = SHARED.bounds
    assert queries.tolist() == [0, 9, 12, 16, 17, 37, 77, 157, 160]
    assert keys.diff().tolist() == [9, 12, 13, 10, 20, 60, 100, 3]
    assert SHARED.key_index[: 9 + 12].tolist() == [*range(9), *range(12)]
    assert len(SHARED.key_index) == keys[-1]
    assert SHARED.longest == (80, 100)


def test_a_rank_has_its_own_queries_and_reads_all_keys() -> None:
    plan = SHARED.of([(10, 14), (150, 159)])
    assert plan.pieces == (
        Piece((0, 2), ((0, 9), (9, 12))),
        Piece((2, 4), ((0, 9), (12, 14))),
        Piece((4, 11), ((17, 37), (77, 157))),
        Piece((11, 13), ((157, 159),)),
    )


class VariableLength(nn.Module):
    """What Transformer Engine documents of a call with sequences of different length, one after the other."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any) -> Tensor:
        packed = kwargs["packed_seq_params"]
        assert kwargs["attn_mask_type"].name == "padding_causal_bottom_right"
        assert packed.qkv_format == "thd"
        queries, keys = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist()
        assert packed.max_seqlen_q == max(b - a for a, b in pairwise(queries))
        assert packed.max_seqlen_kv == max(b - a for a, b in pairwise(keys))
        parts = [
            naive(of_one(b - a, d - c), query[a:b], key[c:d], value[c:d])
            for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True)
        ]
        return torch.cat(parts)


def of_one(queries: int, keys: int) -> AttentionPlan:
    return AttentionPlan((Piece((0, queries), ((0, keys),)),))


def test_the_hook_of_a_gpu_makes_one_variable_length_call_of_a_row() -> None:
    model = nn.ModuleDict({"core_attention": VariableLength()})
    take_plans([model])
    inputs = tensors(SHARED.num_queries, 160)
    packed = PlannedSeqParams(SHARED, device=torch.device("cpu"))
    assert (packed.cu_seqlens_q.tolist(), packed.max_seqlen_q) == ([0, 160], 160)  # to Megatron, and its RoPE
    compare([model["core_attention"](*inputs, None, packed_seq_params=packed), naive(SHARED, *inputs)], inputs)


def test_rope_is_read_by_position() -> None:
    class Rope(nn.Module):
        def forward(self, length: int, factor: float | None) -> Any:
            table = torch.arange(length).view(-1, 1, 1, 1)
            return table if factor is None else (table, factor)

    model, positions = nn.ModuleDict({"rotary_pos_emb": Rope()}), torch.tensor([0, 1, 2, 1, 2, 3])
    model.rotary_pos_emb = model["rotary_pos_emb"]
    with rope_by_position(model, positions):
        assert torch.equal(model.rotary_pos_emb(6, None).flatten(), positions)
        table, factor = model.rotary_pos_emb(6, 1.5)  # YaRN's
        assert (table.flatten().tolist(), factor) == (positions.tolist(), 1.5)
    assert model.rotary_pos_emb(6, None).flatten().tolist() == list(range(6))


def of_megatron() -> dict[str, list[Any]]:
    """Outputs and gradients by torch, and by Megatron's own; and which of them computed a case."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from tests.models import ModelSpec, transformer_config

    def attention(**config: Any) -> DotProductAttention:
        spec = ModelSpec(heads=NP, groups=NG, kv_channels=HN, config=config)
        return DotProductAttention(transformer_config(spec), 2, AttnMaskType.causal, "self")

    padding = torch.arange(12).view(1, 1, 1, 12) >= torch.tensor([12, 7]).view(2, 1, 1, 1)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    cases: dict[str, tuple[int, Tensor | None, dict[str, Any]]] = {
        "causal": (12, None, {}),
        "causal mask": (12, causal, {}),
        "padding mask": (12, causal | padding, {}),
        "decode": (1, None, {}),
        "a cached chunk": (5, causal[..., -5:, :], {}),
        "layer scaling": (12, None, {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}),
        "sliding window": (12, None, {"window_size": (3, 0)}),
        "softmax offset": (12, None, {"softmax_type": "off-by-one"}),
        "dropout": (12, None, {"attention_dropout": 0.1}),
    }
    results = {}
    for name, (sq, mask, config) in cases.items():
        module, inputs = attention(**config), tensors(sq, 12, 2)
        results[name] = []
        for forward in (DotProductAttention.forward, DotProductAttention.forward.__wrapped__):
            model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            output = forward(module, *inputs, mask)
            results[name].append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    query, key, value = tensors(12, 12)
    apart = ~torch.block_diag(*(torch.ones(n, n, dtype=torch.bool).tril() for n in (5, 4, 3)))
    wanted = attention()(*(x[:, None] for x in (query, key, value)), apart[None, None])[:, 0]
    got = attention()(query, key, value, None, packed_seq_params=packed)
    results["packed"] = [[x.detach(), *torch.autograd.grad(x.sum(), (query, key, value))] for x in (got, wanted)]
    for config in ({"window_size": (3, 0)}, {"attention_dropout": 0.1}):
        with pytest.raises(ValueError, match="packed rows do not work on the CPU with --"):
            attention(**config)(query, key, value, None, packed_seq_params=packed)
    return results


def test_it_is_megatrons_attention() -> None:
    [results] = ranks.run(of_megatron)
    for name, (mine, theirs) in results.items():
        for got, wanted in zip(mine, theirs, strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("sliding window", "softmax offset", "dropout"):  # Megatron computed them
        assert all(torch.equal(*pair) for pair in zip(*results[name], strict=True)), name
