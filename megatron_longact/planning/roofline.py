"""What LongAct takes of a step's time, by a roofline; every assumption is a field of `Assumptions`."""

from dataclasses import dataclass
from math import ceil, log2

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.planning.cost import CaptureWork, Collective, MaskWork
from megatron_longact.planning.run_shape import Batch, Parallel, check_least


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The machine, and how well it is used. The docstring under a field is its flag's help."""

    peak_tflops: float = 989.0
    """Dense matrix multiplications of one GPU in 16 bits, TFLOP/s (H100 SXM: 989)."""
    peak_tflops_fp8: float = 1979.0
    """The same in FP8, for --dtype fp8."""
    mfu: float = 0.40
    """Share of that peak that the model's own FLOPs reach; a higher one makes LongAct's share larger."""
    hbm_gbps: float = 3350.0
    """Memory bandwidth of one GPU, GB/s (H100 SXM: 3350)."""
    hbm_efficiency: float = 0.70
    """Share of the memory bandwidth that elementwise operations and reductions reach."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    nvlink_gbps: float = 450.0
    """What a GPU sends over NVLink, GB/s (H100 SXM: 450 in each direction)."""
    network_gbps: float = 50.0
    """What a GPU sends to another node, GB/s (one 400 Gb/s adapter a GPU: 50)."""
    hop_us: float = 10.0
    """Latency of a collective over 2 ranks; it grows with the logarithm of their number."""
    kernel_us: float = 3.0
    """Least time of a kernel, its launch included."""
    host_us_per_layer: float = 100.0
    """Host work of a refresh for each layer of the model: masks to row indices, while the GPU waits."""

    def __post_init__(self) -> None:
        check_least(self, 1, "gpus_per_node")
        check_least(self, 0, "hop_us", "kernel_us", "host_us_per_layer")
        for name in ("peak_tflops", "peak_tflops_fp8", "hbm_gbps", "nvlink_gbps", "network_gbps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be more than 0")
        for name in ("mfu", "hbm_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a share in (0, 1]")

    def seconds(self, flops: float, parallel: Parallel, batch: Batch) -> float:
        """Time of so many FLOPs of a model, over all GPUs alike."""
        peak = self.peak_tflops_fp8 if batch.dtype == "fp8" else self.peak_tflops
        return flops / parallel.world_size / (peak * 1e12 * self.mfu)


@dataclass(frozen=True)
class Share:
    """Seconds of one step on one GPU, and what LongAct adds to them."""

    dense_step_s: float
    capture_s: float
    collectives_s: float
    host_s: float
    mask_s: float

    @property
    def refresh_s(self) -> float:
        """Added to a step that selects anew."""
        return self.capture_s + self.collectives_s + self.host_s + self.mask_s

    def over_dense(self, interval: int) -> float:
        """Mean time that is added, over the dense step, at a refresh interval; 0: the mask is kept."""
        rare = 0.0 if interval == 0 else 1 / interval
        return (self.mask_s + rare * (self.refresh_s - self.mask_s)) / self.dense_step_s


def step_flops(model: HFModel, batch: Batch) -> float:
    """The model's FLOPs of an optimizer step on all GPUs, with the logits of every token."""
    return flops(model, tokens=batch.tokens, pairs=batch.tokens * batch.seq_length / 2, outputs=batch.tokens)


def flops(model: HFModel, *, tokens: int, pairs: float, outputs: int) -> float:
    """The model's FLOPs of forward and backward, without recomputation.

    pairs: queries times the keys that they see, half of the square for a causal sequence; outputs: tokens whose logits
    are made.
    """
    h, nq = model.hidden_size, model.num_attention_heads * model.head_dim
    nk = model.num_query_groups * model.head_dim
    experts = model.experts
    mlp = model.num_layers * 3 * h * model.intermediate_size
    if experts is not None:
        each = 3 * h * (experts.intermediate_size * experts.per_token + experts.shared_size) + h * experts.count
        mlp = mlp * experts.dense_layers // model.num_layers + each * (model.num_layers - experts.dense_layers)
    layers = model.num_layers * ((2 * h * nq + 2 * h * nk) * tokens + 2 * nq * pairs) + mlp * tokens
    return 6.0 * (layers + h * model.vocab_size * outputs)


def collective_seconds(call: Collective, parallel: Parallel, assumed: Assumptions) -> float:
    """Time of one collective: latency, and bytes over the slowest link of the group; Megatron's order of ranks."""
    if call.size == 1:
        return 0.0
    span = {"tp": parallel.tp, "dp_cp": parallel.tp * parallel.dp_cp, "pp": parallel.world_size}[call.group]
    bandwidth = assumed.nvlink_gbps if span <= assumed.gpus_per_node else assumed.network_gbps
    return ceil(log2(call.size)) * assumed.hop_us * 1e-6 + call.wire_bytes / (bandwidth * 1e9)


def share(
    model: HFModel,
    parallel: Parallel,
    batch: Batch,
    *,
    capture: CaptureWork,
    mask: MaskWork,
    collectives: list[Collective],
    assumed: Assumptions,
) -> Share:
    """The roofline of one rank: its work over the bandwidths and latencies that are assumed, nothing overlapped."""
    hbm = assumed.hbm_gbps * assumed.hbm_efficiency * 1e9
    kernel = assumed.kernel_us * 1e-6
    return Share(
        dense_step_s=assumed.seconds(step_flops(model, batch), parallel, batch),
        capture_s=capture.traffic / hbm + capture.operations * kernel,
        collectives_s=sum(collective_seconds(call, parallel, assumed) for call in collectives),
        host_s=model.num_layers * assumed.host_us_per_layer * 1e-6,
        mask_s=mask.traffic / hbm + mask.operations * kernel,
    )
