"""What the training itself holds on a rank, LongAct apart: does a recipe fit? Weights and optimizer exactly.

With full recomputation, as the recipes have it: the input of every layer, and the activations of one. Beside it stand,
uncounted, what CUDA, NCCL and the kernels keep, and fragments. While responses are made, their cache of keys and values
stands where the activations do in training.
"""

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.conversion.mapping import padded_vocab_size
from megatron_longact.planning.run_shape import Batch, Parallel

_WEIGHTS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
_OPTIMIZER = {"fp32": 8, "bf16": 12, "fp16": 12, "fp8": 12}
"""Bytes a parameter of Adam's moments, and of the masters where weights have 16 bits."""


def training_memory(
    model: HFModel, parallel: Parallel, batch: Batch, *, row: int, gathered: int = 0
) -> dict[str, float]:
    """Bytes by name on the rank that holds most; gradients are fp32.

    row: tokens of a row before context parallelism cuts it; gathered: K and V of one layer after the gather of shared
    prompts.
    """
    dense, experts = parameters_of_rank(model, parallel)
    shards = parallel.optimizer_shards
    expert_shards = max(shards // parallel.ep, 1)
    tokens = batch.micro_batch_size * row / parallel.cp
    in_flight = min(parallel.pp, batch.num_microbatches(parallel))
    hidden = model.hidden_size / (parallel.tp if parallel.sequence_parallel else 1)
    layers = max(parallel.stages(model.num_layers))
    return {
        "weights": (dense + experts) * _WEIGHTS[batch.dtype],
        "gradients, fp32": (dense + experts) * 4,
        "masters and moments": (dense / shards + experts / expert_shards) * _OPTIMIZER[batch.dtype],
        "inputs of layers": in_flight * layers * tokens * hidden * batch.activation_bytes,
        "activations of one layer, about": tokens * _layer_channels(model, parallel, hidden) * batch.activation_bytes,
        "K and V gathered for shared prompts, one layer": gathered,
    }


def parameters_of_rank(model: HFModel, parallel: Parallel) -> tuple[float, float]:
    """Parameters on the stage that holds most: of experts, and all others.

    Source: Megatron's `theoretical_memory_usage`, with the weights of q/k-layernorm and biases of QKV, which it leaves
    out; experts are cut by tensor parallelism too, as far as there are ranks.
    """
    h, experts = model.hidden_size, model.experts
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    layers = max(parallel.stages(model.num_layers))
    cut = 2 * h * q + 2 * h * k + (q + 2 * k) * model.family.qkv_bias
    whole = 2 * h + 2 * model.head_dim * model.family.qk_layernorm
    of_experts = 0.0
    if experts is None:
        cut += 3 * h * model.intermediate_size
    else:
        whole += h * experts.count
        ranks = parallel.tp * min(parallel.dp_cp, parallel.ep)
        of_experts = layers * 3 * h * experts.intermediate_size * experts.count / ranks
    tables = 2 if parallel.pp == 1 and not model.tied else 1
    dense = (layers * cut + tables * h * padded_vocab_size(model)) / parallel.tp + layers * whole + h
    return dense, of_experts


def _layer_channels(model: HFModel, parallel: Parallel, hidden: float) -> float:
    """Elements a token that a layer keeps for its backward: norms, Q, K and V before and after norm and RoPE, MLP."""
    q, k = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    attention = (q + 2 * k) + (1 + model.family.qk_layernorm) * (q + k) + q
    mlp = 3 * model.intermediate_size
    if model.experts is not None:
        mlp = 3 * model.experts.intermediate_size * model.experts.per_token
    return 4 * hidden + (attention + mlp) / parallel.tp
