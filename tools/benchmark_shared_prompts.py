"""What computing a prompt once saves: time of a step and of its log-probs with and without, and peak memory.

    torchrun --standalone --nproc-per-node 2 tools/benchmark_shared_prompts.py --tensor-model-parallel-size 2

The arms take turns in one process group, on one model: `apart`, each response in a padded row with a prompt of its own
(`--no-shared-prompts`); `shared`, what `--shared-prompts` makes of the same responses. A round is a pass for old
log-probs and an optimizer step; ratios are formed round by round, of wall times and of rank 0's processor times, which
other work on the machine disturbs less. The last column is what a first step on a rollout batch saves beside that,
which needs no such pass. The model has SmolLM2-135M's shape, if nothing else is said. Without a GPU it runs over gloo.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, ON_GPU, peak_bytes, transformer_settings

if not ON_GPU:
    from megatron_longact.megatron.cpu import enable_cpu_mode

    enable_cpu_mode()

from benchmark_overhead import initialise
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_longact.megatron.planned_attention import take_plans
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.rl.batches.micro_batches import BatchLayout
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
from megatron_longact.rl.objectives.objective import Objective
from megatron_longact.rl.objectives.policy_losses import PolicyLossConfig


@dataclass(frozen=True)
class Shape:
    """A rollout batch: `responses` of them, groups of `group`, tokens of a prompt and of a response."""

    prompt: int
    response: int
    group: int
    responses: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`1024+32x8`, or `1024+32x8/16`: 16 responses in all; 8 without it, or a group if that is more."""
        sizes, _, responses = text.partition("/")
        lengths, group = sizes.split("x")
        prompt, response = lengths.split("+")
        return cls(int(prompt), int(response), int(group), int(responses or max(8, int(group))))


@dataclass
class Arm:
    """One way to lay the batch out: seconds of its rounds, wall and processor, and bytes at the peak of a backward."""

    tokens: int = 0
    log_probs: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def totals(self, clock: int) -> list[float]:
        """Of both, round by round."""
        return [a[clock] + b[clock] for a, b in zip(self.log_probs, self.steps, strict=True)]


def build(args: argparse.Namespace, *, seq_length: int) -> tuple[Any, Any]:
    """A GPTModel in DDP, and its optimizer."""
    bf16 = args.dtype == "bf16"
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.hidden_size // args.kv_channels,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        ffn_hidden_size=args.ffn_hidden_size,
        masked_softmax_fusion=False,
        **transformer_settings(args.dtype, tensor_model_parallel_size=args.tensor_model_parallel_size),
    )
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_with_transformer_engine_spec if ON_GPU else get_gpt_layer_local_spec
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec() if ON_GPU else spec(normalization="RMSNorm"),
        vocab_size=args.vocab_size,
        max_sequence_length=seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    ).to(DEVICE)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model) if bf16 else model)
    take_plans([chunk])
    settings = {"optimizer": "adam", "lr": 1e-6, "bf16": bf16, "params_dtype": config.params_dtype}
    return chunk, get_megatron_optimizer(OptimizerConfig(**settings, use_distributed_optimizer=True), [chunk])


def rollouts(shape: Shape, *, vocab_size: int) -> RolloutBatch:
    """Random prompts and responses, all as long as the shape says."""
    n, r, generator = shape.responses, shape.response, torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab_size, (-(-n // shape.group), shape.prompt), generator=generator).tolist()
    return RolloutBatch(
        step=0,
        prompts=[tuple(prompts[i // shape.group]) for i in range(n)],
        responses=torch.randint(vocab_size, (n, r), generator=generator),
        lengths=torch.full((n,), r),
        rollout_log_probs=torch.zeros(n, r),
        rewards=torch.zeros(n),
        correct=torch.zeros(n, dtype=torch.bool),
        finished=torch.ones(n, dtype=torch.bool),
        advantages=torch.randn(n, generator=generator),
    )


class Run:
    """Log-probs and steps on one batch, as one arm lays it out."""

    def __init__(self, args: argparse.Namespace, shape: Shape, model: tuple[Any, Any], *, shared: bool) -> None:
        self.chunk, self.optimizer = model
        self.batch = rollouts(shape, vocab_size=args.vocab_size)
        config = RLConfig(
            run_dir="",
            max_response_length=shape.response,
            prompts_per_step=-(-shape.responses // shape.group),
            group_size=shape.group,
            epochs=1,
            global_batch_size=shape.responses,
            micro_batch_size=args.micro_batch_size,
            seq_length=shape.prompt + shape.response,
            kl_beta=0.0,
            heldout_prompts=1,
            seed=1,
            shared_prompts=shared,
            loss=PolicyLossConfig(),
        )
        pgs = ProcessGroupCollection.use_mpu_process_groups()
        self.layout = BatchLayout.of_rank(config, pgs, pad_token=0, multiple_of=16)
        scorer = ResponseScorer(temperature=1.0, vocab_size=args.vocab_size, tp_group=pgs.tp)
        self.objective = Objective(config, scorer, None, dp_size=pgs.dp.size())
        self.trainer_log_probs = TrainerLogProbs([self.chunk], scorer, self.layout, pg_collection=pgs)

    def log_probs(self) -> None:
        """The pass before the first update."""
        self.batch.old_log_probs = self.trainer_log_probs.of_batch(self.batch)

    def backward(self) -> None:
        """Everything before the optimizer."""
        [plan] = self.layout.plan(self.batch)
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self.objective.forward_step(
                self.batch.response_mask, num_microbatches=len(plan.micro_batches)
            ),
            data_iterator=iter([self.layout.micro_batch(self.batch, part) for part in plan.micro_batches]),
            model=self.chunk,
            num_microbatches=len(plan.micro_batches),
            seq_length=self.layout.config.seq_length,
            micro_batch_size=self.layout.micro_batch_size,
            forward_only=False,
        )

    def step(self) -> None:
        """One optimizer step."""
        self.backward()
        self.optimizer.step()


def timed(action: Callable[[], None]) -> tuple[float, float]:
    """Seconds of all ranks together, and of this one's processor."""
    torch.distributed.barrier()
    begun, processor = time.perf_counter(), time.process_time()
    action()
    if ON_GPU:
        torch.cuda.synchronize()
    processor = time.process_time() - processor
    torch.distributed.barrier()
    return time.perf_counter() - begun, processor


def measure(args: argparse.Namespace, shape: Shape, model: tuple[Any, Any]) -> dict[str, Arm]:
    """Both arms in turn, after a round that is not timed and tells their memory."""
    runs = {name: Run(args, shape, model, shared=name == "shared") for name in ("apart", "shared")}
    arms = {name: Arm() for name in runs}
    for name, run in runs.items():
        run.log_probs()
        run.step()
        arms[name].tokens = run.layout.plan(run.batch)[0].tokens
        arms[name].peak_bytes = peak_bytes(run.backward)
    for index in range(args.rounds):
        for name in list(runs)[:: 1 if index % 2 else -1]:
            arms[name].log_probs.append(timed(runs[name].log_probs))
            arms[name].steps.append(timed(runs[name].step))
    return arms


HEADER = """| prompt + response, group | tokens | step + log-probs, s | × | × by processor | peak, MiB | no pass saves |
|---|---|---|---|---|---|---|"""


def row(shape: Shape, arms: dict[str, Arm]) -> str:
    """One line of the table."""
    apart, shared = arms["apart"], arms["shared"]
    seconds = [statistics.median(arm.totals(0)) for arm in (apart, shared)]
    times = [
        statistics.median(a / b for a, b in zip(apart.totals(clock), shared.totals(clock), strict=True))
        for clock in (0, 1)
    ]
    saved = statistics.median(a[1] / t for a, t in zip(shared.log_probs, shared.totals(1), strict=True))
    peaks = " → ".join(f"{arm.peak_bytes / 2**20:,.0f}" for arm in (apart, shared))
    cells = [
        f"{shape.prompt:,} + {shape.response}, {shape.group}",
        f"{apart.tokens:,} → {shared.tokens:,}",
        f"{seconds[0]:.2f} → {seconds[1]:.2f}",
        f"{times[0]:.2f}",
        f"{times[1]:.2f}",
        peaks,
        f"{saved:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every shape, print a table, and write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        default=["1024+32x8", "256+32x8/16", "256+32x2/16", "32+32x2/32", "16+64x2/32", "128+32x1/16"],
        help="PROMPT+RESPONSExGROUP[/RESPONSES]",
    )
    add("--num-layers", type=int, default=30)
    add("--hidden-size", type=int, default=576)
    add("--ffn-hidden-size", type=int, default=1536)
    add("--kv-channels", type=int, default=64)
    add("--num-query-groups", type=int, default=3)
    add("--vocab-size", type=int, default=49152)
    add("--micro-batch-size", type=int, default=4)
    add("--tensor-model-parallel-size", type=int, default=1)
    add("--dtype", choices=["bf16", "fp32"], default="fp32")
    add("--rounds", type=int, default=3, help="counted rounds of both arms")
    add("--output", type=Path, help="JSON file for the raw numbers")
    add_overwrite_arg(parser)
    args = parser.parse_args()
    if end_in_one_line("benchmark_shared_prompts", lambda: check_new(args.output, overwrite=args.overwrite)):
        sys.exit(1)
    initialise(args)
    shapes = [Shape.parse(text) for text in args.shapes]
    model = build(args, seq_length=max(shape.prompt + shape.response for shape in shapes))
    rank0, report = torch.distributed.get_rank() == 0, []
    if rank0:
        print(f"\n{HEADER}", flush=True)
    for shape in shapes:
        arms = measure(args, shape, model)
        report.append({"shape": asdict(shape), "arms": {name: asdict(arm) for name, arm in arms.items()}})
        if rank0:
            print(row(shape, arms), flush=True)
    if rank0 and args.output:
        flags = {name: str(value) for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"flags": flags, "runs": report}, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
