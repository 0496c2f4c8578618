"""Torch in place of the CUDA kernels that Transformer Engine's bf16 modules and FusedAdam start.

What stands in for what; everything around it is Transformer Engine's own Python, autograd functions included:

    tex.generic_gemm              a product in fp32, rounded once to the output's type; `accumulate` adds in place
    tex.rmsnorm_fwd, rmsnorm_bwd  the formulas in fp32
    tex.multi_tensor_adam, and …_param_remainder
                                  Adam in fp32; a bf16 weight and its int16 remainder are put together to the fp32
                                  master and taken apart as csrc does: the weight's bits are one more where the
                                  remainder is negative
    DotProductAttention.forward   torch's `scaled_dot_product_attention`, causal; packed sequences one by one, causal
                                  from the bottom right
    Tensor.is_cuda                True where `transformer_engine.pytorch.module.base` asserts it

Not here: anything that quantises. FP8 tensors can be made of bytes by hand, but no module runs in FP8.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Put them in wherever Transformer Engine's modules have bound the kernels, which it imports."""
    import transformer_engine.pytorch as te

    for kernel in (generic_gemm, rmsnorm_fwd, rmsnorm_bwd, multi_tensor_adam, multi_tensor_adam_param_remainder):
        for name, module in list(sys.modules.items()):
            if name.startswith("transformer_engine") and hasattr(module, kernel.__name__):
                setattr(module, kernel.__name__, kernel)
    te.DotProductAttention.forward = attention
    _believe_in_cuda()


def _believe_in_cuda() -> None:
    is_cuda = torch.Tensor.is_cuda

    def believed(tensor: Tensor) -> bool:
        asserts = sys._getframe(1).f_globals.get("__name__") == "transformer_engine.pytorch.module.base"
        return asserts or is_cuda.__get__(tensor)

    torch.Tensor.is_cuda = property(believed)  # type: ignore[assignment]


def _dtype(te_dtype: Any, default: torch.dtype) -> torch.dtype:
    from transformer_engine.pytorch.constants import TE_DType

    return next((torch_dtype for torch_dtype, known in TE_DType.items() if known == te_dtype), default)


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    **overlap: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(b) [..., k] @ op(a) [k, n]; with `grad` the bias' gradient beside it: cuBLAS' order, columns first."""
    assert quantizer is None
    assert not gelu
    a, rows = a.flatten(0, -2), b.flatten(0, -2)
    result = (rows.T if transb else b).float() @ (a.T if transa else a).float()
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = rows.sum(0, dtype=torch.float32).to(bias.dtype)
        else:
            result += bias
    if out is None:
        return result.to(_dtype(out_dtype, a.dtype)), bias_gradient, None, None
    out.copy_(out + result if accumulate else result)
    return out, bias_gradient, None, None


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, out_dtype: Any, margin: int, zero_centered: bool
) -> tuple[Tensor, None, Tensor]:
    """From [t, h]: (normalised [t, h], None, 1/rms fp32 [t])."""
    assert out is None
    assert quantizer is None
    rsigma = torch.rsqrt(x.float().square().mean(-1) + eps)
    gamma = weight.float() + zero_centered
    return (x.float() * rsigma[:, None] * gamma).to(_dtype(out_dtype, x.dtype)), None, rsigma


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [t, h] and of the weight [h]."""
    normal = x.float() * rsigma[:, None]
    inner = dy.float() * (weight.float() + zero_centered)
    dx = rsigma[:, None] * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normal).sum(0).to(weight.dtype)


def attention(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Q [sq, b, np, hn], K and V [sq, b, ng, hn] -> [sq, b, np * hn]; packed ones have no b."""
    assert self.cp_group is None  # this one sees its own rank alone
    if kwargs.get("qkv_format") == "thd":
        return _of_sequences(query, key, value, **kwargs)
    sq, b = query.shape[:2]
    heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return context.permute(2, 0, 1, 3).reshape(sq, b, -1)


def _of_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask_type: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    **unused: Any,
) -> Tensor:
    """Sequence by sequence: Q [t, np, hn], K and V [their keys, ng, hn] -> [t, np * hn]."""
    sizes = [bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_kv)]
    assert (max(sizes[0]), max(sizes[1])) == (max_seqlen_q, max_seqlen_kv)
    assert attn_mask_type == "padding_causal_bottom_right" or (
        attn_mask_type == "padding_causal" and sizes[0] == sizes[1]
    )
    parts = (x.split(n) for x, n in zip((query, key, value), (sizes[0], sizes[1], sizes[1]), strict=True))
    contexts = []
    for q, k, v in zip(*parts, strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        contexts.append(
            F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(contexts).flatten(1)


def _adam(
    g: Tensor,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    weight_decay: float,
) -> Tensor:
    """The new value of p, fp32; m and v are updated in place."""
    g = g.float() if decoupled else g.float() + weight_decay * p
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    update = (m / corrections[0]) / ((v / corrections[1]).sqrt() + eps)
    return p - lr * (update + weight_decay * p if decoupled else update)


def multi_tensor_adam(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], *hyper: Any) -> None:
    """lists: gradients, parameters, both moments, and masters where there are some."""
    for g, p, m, v, *masters in zip(*lists, strict=True):
        new = _adam(g, masters[0] if masters else p.float(), m, v, *hyper)
        for tensor in (p, *masters):
            tensor.copy_(new)


def multi_tensor_adam_param_remainder(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], *hyper: Any) -> None:
    """lists: gradients, bf16 parameters, both moments, int16 remainders."""
    for g, p, m, v, remainder in zip(*lists, strict=True):
        low = remainder.int()
        high = p.view(torch.int16).int() - (low < 0).int()
        master = ((high << 16) | (low & 0xFFFF)).view(torch.float32)
        bits = _adam(g, master, m, v, *hyper).view(torch.int32)
        remainder.copy_(bits.to(torch.int16))
        p.view(torch.int16).copy_((bits >> 16) + (remainder < 0).int())
