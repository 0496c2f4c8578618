"""What LongAct costs: step time and memory with it over without it, interleaved in one process group.

    torchrun --standalone --nproc-per-node 2 tools/benchmark_overhead.py --tensor-model-parallel-size 2 --output x.json

The arms take turns on one model: `dense`; `refresh`, a LongAct step that selects anew; `keep`, one that keeps its
mask; and `naive`, the plain way to the same update: dense 0/1 masks multiplied into the gradients, and a copy
of the master weights before each step. A refresh interval of n costs (refresh + (n - 1) keep) / n. Ratios are
formed round by round and their median is reported with the quartiles: of wall times, and of rank 0's processor
times, which other work on the machine disturbs less. Without a GPU it runs over gloo. Layers of Qwen3-8B's shape:
`--hidden-size 4096 --kv-channels 128 --dtype bf16 --fp8 hybrid --fp8-recipe tensorwise`, as many as fit.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, ON_GPU, held_bytes, peak_bytes, spread, transformer_settings

if not ON_GPU:
    from megatron_longact.megatron.cpu import enable_cpu_mode

    enable_cpu_mode()

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longact import LongAct, LongActConfig
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.optimizer_shards import chained, resolve_shards


@dataclass
class Arm:
    """One way to make a step: seconds of its rounds, and bytes."""

    seconds: list[float]
    processor_seconds: list[float]
    peak_bytes: int = 0
    """At the peak of forward and backward, above their start."""
    optimizer_peak_bytes: int = 0
    """The same of the optimizer's step."""
    held_bytes: int = 0
    """Between two steps, above what was there before LongAct, or the naive way."""
    allocated_bytes: int = 0
    """All that is allocated when a forward begins."""


@dataclass
class Model:
    """A model in DDP, its optimizer, and a batch."""

    chunks: list[Any]
    optimizer: Any
    tokens: torch.Tensor
    num_microbatches: int = 1
    selected: dict[str, Any] | None = None
    """LongAct's state after a selection, for steps that keep its mask."""

    def step(self) -> None:
        """Make one optimizer step."""
        self.backward()
        self.optimizer.step()
        if ON_GPU:
            torch.cuda.synchronize()

    def backward(self) -> None:
        """Everything before the optimizer."""
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=None,
            model=self.chunks[0],
            num_microbatches=self.num_microbatches,
            seq_length=self.tokens.shape[1],
            micro_batch_size=self.tokens.shape[0],
            forward_only=False,
        )

    def _forward(self, data: Any, model: Any) -> Any:
        b, s = self.tokens.shape
        longact = LongAct.of(self.optimizer)
        if longact is not None:
            longact.set_tokens(torch.ones_like(self.tokens, dtype=torch.bool))
        mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1) if not ON_GPU else None
        position_ids = torch.arange(s, device=self.tokens.device).expand(b, s)
        output = model(self.tokens, position_ids, mask, labels=self.tokens)
        return output, lambda losses: (losses.float().mean(), {})


def build(args: argparse.Namespace, *, hidden_size: int, seq_length: int) -> Model:
    """A Qwen3-shaped stack of `args.num_layers` layers."""
    bf16 = args.dtype == "bf16"
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // args.kv_channels,
        num_query_groups=max(hidden_size // args.kv_channels // 4, 1),
        kv_channels=args.kv_channels,
        ffn_hidden_size=3 * hidden_size,
        qk_layernorm=True,
        masked_softmax_fusion=ON_GPU,
        fp8=args.fp8,
        fp8_recipe=args.fp8_recipe if args.fp8 else "delayed",
        fp8_param=args.fp8_param_gather,
        recompute_granularity="full" if args.recompute else None,
        recompute_method="uniform" if args.recompute else None,
        recompute_num_layers=1 if args.recompute else None,
        **transformer_settings(args.dtype, tensor_model_parallel_size=args.tensor_model_parallel_size),
    )
    config.finalize_model_grads_func = finalize_model_grads
    layer_spec = (
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        if ON_GPU
        else get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        vocab_size=args.vocab_size,
        max_sequence_length=seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    wrapped = Float16Module(config, model.to(DEVICE)) if bf16 else model.to(DEVICE)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True, fp8_param_gather=args.fp8_param_gather
    )
    chunk = DistributedDataParallel(config, ddp_config, wrapped)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-6,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            fp8_recipe=args.fp8_recipe if args.fp8 else None,
        ),
        [chunk],
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(args.vocab_size, (1, seq_length), generator=generator).to(DEVICE)
    return Model([chunk], optimizer, tokens, args.num_microbatches)


@contextmanager
def longact(model: Model, *, refresh: bool) -> Iterator[None]:
    """LongAct on the model, selecting in the next step or keeping a mask that it has."""
    with LongAct.attach(model.chunks, model.optimizer, LongActConfig(refresh_interval=int(refresh))) as attached:
        if not refresh:
            if model.selected is None:
                model.step()
                model.selected = attached.state_dict()
            attached.load_state_dict(model.selected)
        yield


@contextmanager
def naive(model: Model) -> Iterator[None]:
    """The plain way, with a random mask: no selection is paid for, only the masked update."""
    config = model.chunks[0].config
    finalize = config.finalize_model_grads_func
    parameters = [p for name, p in model.chunks[0].named_parameters() if "linear_qkv.weight" in name]
    masks = {
        p: (torch.rand(p.shape[0], 1, device=p.device) < 0.3).float().expand_as(p).contiguous() for p in parameters
    }
    shards = [s for o in chained(model.optimizer) for s in resolve_shards(o, parameters, LongActConfig())]
    saved: list[torch.Tensor] = []

    def finalize_and_mask(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        for parameter, mask in masks.items():
            parameter.main_grad.mul_(mask)

    def save(*_: Any) -> None:
        saved[:] = [shard.masters()[0].detach().clone() for shard in shards]

    def restore(*_: Any) -> None:
        for shard, old in zip(shards, saved, strict=True):
            new, keep = shard.masters()[0], masks[shard.parameter].view(-1)[shard.start : shard.end]
            new.data.copy_(torch.where(keep.view_as(old) > 0, new, old))
        saved.clear()

    inner = chained(model.optimizer)[0].optimizer
    handles = [inner.register_step_pre_hook(save), inner.register_step_post_hook(restore)]
    config.finalize_model_grads_func = finalize_and_mask
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize
        for handle in handles:
            handle.remove()


@contextmanager
def dense(model: Model) -> Iterator[None]:
    """Nothing."""
    yield


ARMS: dict[str, Callable[[Model], Any]] = {
    "dense": dense,
    "refresh": lambda model: longact(model, refresh=True),
    "keep": lambda model: longact(model, refresh=False),
    "naive": naive,
}


def measure(model: Model, names: list[str], *, rounds: int) -> dict[str, Arm]:
    """Each arm in turn, `rounds` times, beginning with another one each time, after two that are not counted."""
    arms = {name: Arm([], []) for name in names}
    peak_bytes(model.step)  # makes the optimizer's state and what else comes with a first step, which belong to no arm
    for index in range(-1, rounds + 1):  # -1: what comes with a first time; 0: memory; the others: time
        first = index % len(names)
        for name in names[first:] + names[:first]:
            before = held_bytes() if index < 1 else 0
            with ARMS[name](model):
                torch.distributed.barrier()
                if index < 1:
                    model.step()
                    arms[name].allocated_bytes = held_bytes()
                    arms[name].held_bytes = arms[name].allocated_bytes - before
                    arms[name].peak_bytes = peak_bytes(model.backward)
                    arms[name].optimizer_peak_bytes = peak_bytes(model.optimizer.step)
                    continue
                begun, processor = time.perf_counter(), time.process_time()
                model.step()
                torch.distributed.barrier()
                arms[name].seconds.append(time.perf_counter() - begun)
                arms[name].processor_seconds.append(time.process_time() - processor)
    return arms


def ratios(arms: dict[str, Arm], interval: int | None, times: str) -> list[float]:
    """Step time over the dense one, round by round; interval None: the naive way; times: a field of `Arm`."""
    plain = getattr(arms["dense"], times)
    if interval is None:
        return [n / d for n, d in zip(getattr(arms["naive"], times), plain, strict=True)]
    refresh, keep = (getattr(arms[name], times) for name in ("refresh", "refresh" if interval == 1 else "keep"))
    return [(r + (interval - 1) * k) / interval / d for r, k, d in zip(refresh, keep, plain, strict=True)]


def row(label: str, arms: dict[str, Arm], name: str, interval: int | None) -> str:
    """One line of the table."""
    arm, plain = arms[name], arms["dense"]
    times = [spread(ratios(arms, interval, field)) for field in ("seconds", "processor_seconds")]
    more = [getattr(arm, field) - getattr(plain, field) for field in MEMORY]
    return f"| {label} | {' | '.join(times)} | {' | '.join(f'{n / 2**20:+.2f}' for n in more)} |"


def memory(arm: Arm) -> str:
    """What dense steps take of this rank's memory."""
    peak = arm.allocated_bytes + max(arm.peak_bytes, arm.optimizer_peak_bytes)
    return f"dense: {arm.allocated_bytes / 2**30:.3f} GiB between steps, {peak / 2**30:.3f} GiB at the peak"


MEMORY = ("peak_bytes", "optimizer_peak_bytes", "held_bytes")
HEADER = """| | wall time over dense | processor time over dense | peak of the backward, MiB | of the optimizer | held |
|---|---|---|---|---|---|"""


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The flags of `build`."""
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[1024])
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048])
    parser.add_argument("--num-microbatches", type=int, default=1, help="of a step, one sequence each")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--kv-channels", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--fp8", default=None, choices=["hybrid", "e4m3"])
    parser.add_argument("--fp8-recipe", choices=["delayed", "tensorwise", "blockwise", "mxfp8"], default="tensorwise")
    parser.add_argument("--fp8-param-gather", action="store_true", help="keep the weights in FP8")
    parser.add_argument("--recompute", action="store_true", help="recompute every layer: for long sequences")


def check_model_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program for flags that do not go together."""
    if args.fp8 and not (ON_GPU and args.dtype == "bf16"):
        parser.error("--fp8 needs a GPU and --dtype bf16")
    if args.fp8_param_gather and not args.fp8:
        parser.error("--fp8-param-gather needs --fp8")


def initialise(args: argparse.Namespace) -> None:
    """Megatron's process groups and generators, under torchrun."""
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def main() -> None:
    """Measure every width and sequence length, print a table, and write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(parser)
    parser.add_argument("--refresh-interval", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="dense, and those beside it")
    parser.add_argument("--rounds", type=int, default=8, help="counted rounds of all arms")
    parser.add_argument("--output", type=Path, help="JSON file for the raw numbers")
    add_overwrite_arg(parser)
    args = parser.parse_args()
    if end_in_one_line("benchmark_overhead", lambda: check_new(args.output, overwrite=args.overwrite)):
        sys.exit(1)
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; quartiles need at least 2")
    check_model_args(parser, args)
    args.arms = list(dict.fromkeys(args.arms))
    if min([*args.refresh_interval, args.num_microbatches]) < 1:
        parser.error("--refresh-interval and --num-microbatches are 1 or more")
    needed = {"dense", "refresh"} | ({"keep"} if max(args.refresh_interval) > 1 else set())
    if lacking := needed - set(args.arms):
        parser.error(f"--arms lacks {', '.join(sorted(lacking))}, of which the rows of --refresh-interval are made")
    initialise(args)
    report = []
    rank0 = torch.distributed.get_rank() == 0
    for hidden_size in args.hidden_size:
        for seq_length in args.seq_length:
            model = build(args, hidden_size=hidden_size, seq_length=seq_length)
            size = sum(p.numel() for p in model.chunks[0].parameters()) * args.tensor_model_parallel_size
            arms = measure(model, args.arms, rounds=args.rounds)
            if rank0:
                seconds = statistics.median(arms["dense"].seconds)
                tokens = f"{args.num_microbatches} x {seq_length} tokens"
                print(f"\n{size / 1e6:.0f} M parameters, hidden {hidden_size}, {tokens}: {seconds:.3f} s")
                print(f"{memory(arms['dense'])}\n")
                print(HEADER)
                for interval in args.refresh_interval:
                    print(row(f"refresh interval {interval}", arms, "refresh", interval))
                if "naive" in arms:
                    print(row("naive masks and copies", arms, "naive", None), flush=True)
            report.append(
                {
                    "parameters": size,
                    "hidden_size": hidden_size,
                    "seq_length": seq_length,
                    "arms": {name: asdict(arm) for name, arm in arms.items()},
                }
            )
            del model  # before the next one is built
            gc.collect()
    if rank0 and args.output:
        args.output.write_text(
            json.dumps({"flags": {k: str(v) for k, v in vars(args).items()}, "runs": report}, indent=1)
        )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
