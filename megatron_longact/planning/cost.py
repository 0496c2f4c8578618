"""What LongAct communicates, holds and reads on one rank, byte by byte, as its modules do it.

Shape letters: L layers of the model, L_r of this rank, nq = np * hn Q channels, nk = ng * hn K channels, n
accumulated channels of this rank, h hidden size. `tests/test_plan.py` holds each number against real ranks.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from megatron_longact.config import LongActConfig
from megatron_longact.planning.run_shape import Attention, Batch, Parallel
from megatron_longact.reduction import STATISTICS
from megatron_longact.reduction_grid import stretches
from megatron_longact.selection import num_selected

_FP32, _INT64, _INT32, _BOOL = 4, 8, 4, 1

_ISFINITE = 7
"""Bytes an fp32 element that `torch.isfinite` needs: |x|, and three tensors of bool."""


@dataclass(frozen=True)
class Collective:
    """One call of torch.distributed on a rank."""

    operation: str
    """all_reduce or all_gather."""
    group: str
    """tp, dp_cp or pp."""
    size: int
    nbytes: int
    """Of the tensor that this rank gives."""

    @property
    def wire_bytes(self) -> int:
        """What a rank sends, by a ring: 2 (size - 1) / size of the tensor for all_reduce, size - 1 for all_gather."""
        if self.operation == "all_gather":
            return (self.size - 1) * self.nbytes
        return -(-2 * (self.size - 1) * self.nbytes // self.size)


class Place(NamedTuple):
    """Which rank: its number of layers, and its tensor-parallel rank."""

    layers: int
    tp_rank: int


def num_accumulated(attention: Attention, parallel: Parallel, config: LongActConfig) -> int:
    """Channels that a rank adds up in a layer: all rows of its shard (V too), or Q and K heads after their norm."""
    layout = attention.layout
    if config.tap == "projection":
        return layout.rows_per_partition(parallel.tp)
    groups = max(layout.num_query_groups // parallel.tp, 1)
    return layout.num_q_channels // parallel.tp + groups * layout.kv_channels


def refresh_collectives(
    attention: Attention, parallel: Parallel, config: LongActConfig, *, layers: int
) -> list[Collective]:
    """The collectives of one refresh, in order; source: `GlobalSaliency`. Those of groups of one rank move nothing."""
    calls = []
    if config.reads_activations:
        sums = layers * (num_accumulated(attention, parallel, config) + 1) * _FP32  # and the count of tokens
        calls += [
            Collective("all_reduce", "dp_cp", parallel.dp_cp, sums),
            Collective("all_gather", "tp", parallel.tp, sums),
        ]
    elif config.select in ("weight-norm", "gradient"):
        rows = layers * attention.layout.rows_per_partition(parallel.tp) * _FP32
        if config.select == "gradient":  # of each row squares and elements
            calls += [Collective("all_reduce", "dp_cp", parallel.dp_cp, 2 * rows)]
        calls += [Collective("all_gather", "tp", parallel.tp, rows)]
    if config.select != "random" and parallel.pp > 1:
        whole = attention.num_layers * attention.num_channels * _FP32
        calls += [Collective("all_reduce", "pp", parallel.pp, whole)]
    return calls


def metric_collectives(parallel: Parallel) -> list[Collective]:
    """Those of `LongAct.metrics`, once a logged step."""
    sizes = {"tp": parallel.tp, "dp_cp": parallel.dp_cp, "pp": parallel.pp}
    return [Collective("all_reduce", group, size, 2 * _FP32) for group, size in sizes.items()]


def qk_rows(attention: Attention, parallel: Parallel, tp_rank: int) -> int:
    """Local rows of a rank that are Q or K."""
    return sum(end - start for start, end in attention.layout.local_qk_ranges(tp_rank, parallel.tp))


def frozen_rows(attention: Attention, config: LongActConfig) -> int:
    """Frozen Q and K rows of the whole model, all tensor-parallel ranks together; exact in every scope."""
    layout, layers = attention.layout, attention.num_layers
    frozen = 0
    for part, heads in (("q", layout.num_attention_heads), ("k", layout.num_query_groups)):
        if part in config.targets:
            units = {"head": heads * layers, "layer": layers, "model": 1}[config.scope]
            channels = heads * layers * layout.kv_channels // units
            frozen += units * (channels - num_selected(config.ratio, channels))
    return frozen


class Bytes(NamedTuple):
    """Of one rank on average, and at most."""

    mean: float
    most: float


def _frozen_of_rank(attention: Attention, parallel: Parallel, config: LongActConfig, place: Place) -> Bytes:
    """Frozen rows of a rank: which of a layer's they are is up to the saliency, so the mean is over the model."""
    frozen, rows = frozen_rows(attention, config), qk_rows(attention, parallel, place.tp_rank)
    mean = frozen * place.layers / attention.num_layers / parallel.tp
    if config.scope == "head" and attention.layout.num_query_groups % parallel.tp == 0:
        return Bytes(mean, mean)
    if config.scope == "model":
        return Bytes(mean, min(rows * place.layers, frozen))
    return Bytes(mean, min(rows, frozen // attention.num_layers) * place.layers)


def held(
    attention: Attention, parallel: Parallel, config: LongActConfig, *, place: Place, on_gpu: bool = True
) -> dict[str, Bytes]:
    """Bytes held between steps by name; `host: …` are in the host's memory.

    on_gpu False: as without a GPU, where the row indices of the host serve as those of the device too.
    """
    channels = attention.num_layers * attention.num_channels
    every = float(qk_rows(attention, parallel, place.tp_rank) * place.layers)
    frozen = _frozen_of_rank(attention, parallel, config, place)
    exact = {
        "sums of activations": place.layers * (num_accumulated(attention, parallel, config) + 1) * _FP32,
        "saliency, whole model": channels * _FP32,
        "masks, whole model": channels * _BOOL,
        "first mask, whole model": channels * _BOOL,
        "last updates of rows, whole model": channels * _INT32,
        "tokens counted": (place.layers + 2) * _FP32,
        "places of layers": place.layers * _INT64 * (config.select != "random"),
        "squares of gradients, overlap of masks": 4 * _FP32,
        "rows of the layout": attention.num_channels * _INT64 * (config.select != "random"),
        "host: all Q and K rows": every * _INT64,
    }
    parts = {name: Bytes(n, n) for name, n in exact.items()}
    parts["host: frozen rows"] = Bytes(*(n * _INT64 for n in frozen))
    if on_gpu:
        parts["all Q and K rows"] = Bytes(every * _INT64, every * _INT64)
        parts["frozen rows"] = Bytes(*(n * _INT64 for n in frozen))
    return parts


def saved_masters(attention: Attention, parallel: Parallel, config: LongActConfig, *, place: Place) -> Bytes:
    """Bytes that strict freeze, and moments that are held, save of fp32 masters during the optimizer's step.

    With the distributed optimizer a rank owns slices of the gradient buffer: the most is the whole of the
    tensor-parallel rank's, the mean what it shares with its data-parallel replicas.
    """
    copies = (config.freeze == "strict") + 2 * (config.moments == "hold")
    frozen = _frozen_of_rank(attention, parallel, config, place)
    element = attention.parameters_per_row * copies * _FP32
    return Bytes(frozen.mean * element / parallel.optimizer_shards, frozen.most * element)


def reduction_temporaries(
    attention: Attention, parallel: Parallel, config: LongActConfig, *, layers: int, on_gpu: bool = True
) -> int:
    """Bytes at the peak of turning a rank's sums into the saliency of the model; source: `GlobalSaliency.from_sums`."""
    if not config.reads_activations:
        return 0
    n = num_accumulated(attention, parallel, config)
    sums = layers * (n + 1) * _FP32
    scores = parallel.tp * layers * n * _FP32
    channels = layers * attention.num_channels * _FP32
    rows = scores if parallel.tp > 1 else 0  # put in the order of the whole weight
    assembling = rows + channels
    whole = attention.num_layers * attention.num_channels * _FP32
    placing = channels + whole
    checking = whole + attention.num_layers * attention.layout.num_q_channels * _ISFINITE
    statistic = STATISTICS[config.statistic]
    held = sums + parallel.tp * sums + scores
    finishing = scores if statistic.power == 2 else parallel.tp * layers * _BOOL if statistic.maximum else 0
    return max(held + max(finishing, assembling, placing), checking)


@dataclass(frozen=True)
class CaptureWork:
    """Reading Q and K on one rank, all micro-batches of a refresh step."""

    activations: int
    """Bytes of the activations of Q and K: what a single read of them is."""
    traffic: int
    """Bytes that the operations read and write, their temporaries included."""
    operations: int
    """Kernels."""
    temporary: int
    """Bytes of temporaries at once, at most."""


def capture_work(
    attention: Attention, parallel: Parallel, batch: Batch, config: LongActConfig, *, place: Place
) -> CaptureWork:
    """Capture in a refresh step on one rank of GPUs; nothing for selectors that read no activations.

    Source: `reduction_triton.reduce`: a kernel reads the activations once, and writes a partial result for each
    stretch of tokens; those are reduced, and join the sums. The weights of tokens are made once a micro-batch, in a
    number of small kernels that depends on the program and is left out.
    """
    if not config.reads_activations:
        return CaptureWork(0, 0, 0, 0)
    tokens, element = batch.tokens_of_microbatch(parallel), batch.activation_bytes
    micro_batches, widths = batch.num_microbatches(parallel), _block_widths(attention, parallel, config, place.tp_rank)
    times = micro_batches * place.layers
    partial = [stretches(tokens, width)[0] * width * _FP32 for width in widths]
    activations = times * tokens * sum(widths) * element
    return CaptureWork(
        activations=activations,
        traffic=activations + times * sum(2 * nbytes for nbytes in partial),
        operations=times * 3 * len(widths) + micro_batches * (1 + batch.tokens_named),  # and the count of tokens
        temporary=max(partial),
    )


def _block_widths(attention: Attention, parallel: Parallel, config: LongActConfig, tp_rank: int) -> list[int]:
    """Channels that one kernel reads: Q and K of all groups at once, apart from parts of groups; or Q, and K heads."""
    if config.tap == "norm":
        q = attention.layout.num_q_channels // parallel.tp
        return [q, num_accumulated(attention, parallel, config) - q]
    widths = Counter(end - start for start, end in attention.layout.local_qk_ranges(tp_rank, parallel.tp))
    return [width * runs for width, runs in widths.items()]


@dataclass(frozen=True)
class MaskWork:
    """What every step does on one rank beside capture: bytes that are read and written, and kernels."""

    traffic: float
    operations: int
    temporary: int
    """Bytes of temporaries at once, at most."""


def mask_work(attention: Attention, parallel: Parallel, config: LongActConfig, *, place: Place) -> MaskWork:
    """Gradient norms, zeroed gradient rows, and masters saved and put back, in fp32; kernels: about."""
    frozen = _frozen_of_rank(attention, parallel, config, place).mean * attention.parameters_per_row
    rows = place.layers * attention.layout.rows_per_partition(parallel.tp)
    shard = rows * attention.parameters_per_row / parallel.optimizer_shards
    saved = saved_masters(attention, parallel, config, place=place).mean
    parameters = place.layers * (1 + attention.qkv_bias)
    kernels = 3 + 1 + 2  # norms and the places of two sets of rows; zeroes; saved and put back
    every = place.layers * qk_rows(attention, parallel, place.tp_rank)
    temporary = 3 * _FP32 * rows + (3 * _INT64 + _FP32) * every  # norms, joined, squared; places of both sets, joined
    return MaskWork(_FP32 * (shard + frozen) + 4 * saved, parameters * kernels, temporary * (1 + attention.qkv_bias))
