"""What a plan is made of: the attention of a model, its parallel layout, and the tokens of a step."""

from dataclasses import dataclass
from typing import Annotated

from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.flags import Flag
from megatron_longact.qkv_layout import QKVLayout

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes of an activation of Q or K: Transformer Engine computes in FP8 and returns 16 bits."""


@dataclass(frozen=True)
class Attention:
    """What LongAct sees of a model."""

    num_layers: int
    hidden_size: int
    layout: QKVLayout
    qkv_bias: bool = False

    @classmethod
    def of(cls, model: HFModel) -> "Attention":
        """The attention of a model."""
        layout = QKVLayout(model.num_attention_heads, model.num_query_groups, model.head_dim)
        return cls(model.num_layers, model.hidden_size, layout, model.family.qkv_bias)

    @property
    def num_channels(self) -> int:
        """Q and K channels of a layer."""
        return self.layout.num_q_channels + self.layout.num_k_channels

    @property
    def parameters_per_row(self) -> int:
        """Elements of linear_qkv with a row: the row, and the bias if there is one."""
        return self.hidden_size + self.qkv_bias


def check_least(given: object, least: float, *names: str) -> None:
    """Raise `ValueError`, by the flag, for a field that is less."""
    for name in names:
        if getattr(given, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be {least:g} or more")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Megatron's parallel sizes. Raises `ValueError` for what Megatron would not accept."""

    tp: int = 1
    """Size of tensor parallelism."""
    pp: int = 1
    """Size of pipeline parallelism."""
    cp: int = 1
    """Size of context parallelism."""
    dp: int = 1
    """Size of data parallelism."""
    ep: int = 1
    """Size of expert parallelism."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, where they do not divide (`--decoder-first-pipeline-num-layers`)."""
    last_stage_layers: int | None = None
    """Layers of the last one (`--decoder-last-pipeline-num-layers`)."""
    distributed_optimizer: Annotated[bool, Flag("--no-distributed-optimizer")] = True
    """Masters are sharded over data-parallel ranks; with this flag every rank has whole ones."""

    sequence_parallel: bool = False
    """Inputs of layers are cut by --tp; it counts in the training's own memory."""

    def __post_init__(self) -> None:
        check_least(self, 1, "tp", "pp", "cp", "dp", "ep")
        if self.tp * self.cp * self.dp % self.ep:
            raise ValueError(
                f"--ep is {self.ep}; it must divide the tensor x context x data parallel size, "
                f"{self.tp} x {self.cp} x {self.dp}"
            )

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def dp_cp(self) -> int:
        """Size of the group that the sums of activations, and the distributed optimizer's shards, are spread over."""
        return self.dp * self.cp

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the masters of one parameter."""
        return self.dp_cp if self.distributed_optimizer else 1

    def stages(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage; `ValueError` if they do not divide."""
        given = [self.first_stage_layers, self.last_stage_layers]
        rest, stages = num_layers - sum(n or 0 for n in given), self.pp - sum(n is not None for n in given)
        if rest < 0 or stages < 0 or (stages == 0 and rest) or (stages and rest % stages):
            raise ValueError(
                f"{num_layers} layers do not divide into --pp {self.pp} stages; give --first-stage-layers or "
                "--last-stage-layers, as Megatron's --decoder-first-pipeline-num-layers"
            )
        middle = [rest // stages] * stages if stages else []
        first, last = ([n] if n is not None else [] for n in given)
        return [*first, *middle, *last]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of an optimizer step, and the type of activations."""

    seq_length: int
    """Tokens of a sequence."""
    global_batch_size: int
    """Sequences of an optimizer step."""
    micro_batch_size: int = 1
    """Sequences of a forward."""
    dtype: Annotated[str, Flag(choices=tuple(BYTES))] = "bf16"
    """Type of the computation."""
    tokens_named: Annotated[bool, Flag("--all-tokens")] = True
    """The program names the tokens that count, as the RL program does; with this flag it does not."""

    def __post_init__(self) -> None:
        check_least(self, 1, "seq_length", "global_batch_size", "micro_batch_size")

    @property
    def tokens(self) -> int:
        """Tokens of a step on all replicas."""
        return self.seq_length * self.global_batch_size

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation of Q or K."""
        return BYTES[self.dtype]

    def num_microbatches(self, parallel: Parallel) -> int:
        """Micro-batches of a step on each replica; `ValueError` if the batch does not divide."""
        at_once = self.micro_batch_size * parallel.dp
        if self.global_batch_size % at_once:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size} is no multiple of --micro-batch-size "
                f"{self.micro_batch_size} x data parallel size {parallel.dp}"
            )
        return self.global_batch_size // at_once

    def tokens_of_microbatch(self, parallel: Parallel) -> int:
        """Tokens of one forward on a rank."""
        if self.seq_length % parallel.cp:
            raise ValueError(f"--seq-length {self.seq_length} does not divide by --cp {parallel.cp}")
        return self.micro_batch_size * self.seq_length // parallel.cp
