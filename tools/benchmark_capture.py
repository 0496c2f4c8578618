"""How fast Q and K are read for their saliency, against a plain copy on the same device, in the same run.

    python tools/benchmark_capture.py --output capture.json

The input is the output of `linear_qkv`, [tokens, rows of a shard], of which Q and K are a strided view: by default
Qwen3-8B's at TP 1 and 4. `of the copy` is bytes read a second over what a copy reads and writes a second; `temporaries`
is memory at the peak over the bytes of Q and K. Masked: an eighth of the tokens does not count.

    reduce      what LongAct runs on this device: parts through temporaries without a GPU, with one a Triton kernel
    norm        torch.linalg.vector_norm, of a copy with zeros where tokens are masked
    whole       x.abs().sum(0, dtype=float32) and its like on all tokens at once
    matmul      the token mask times |x| or x²
    compiled    "whole" through torch.compile, seconds for each size; by --candidates alone
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from measuring import DEVICE, ON_GPU, peak_bytes, seconds
from torch import Tensor

from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.reduction import STATISTICS, qk_blocks

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BEYOND_THE_CACHE = 2**28
"""Bytes that the inputs take together, in turn, so that none of them is found in the cache."""

COPY_BYTES = 2**30
Candidate = Callable[[Tensor, Tensor | None, Any], Tensor]


def whole(x: Tensor, counted: Tensor | None, statistic: str) -> Tensor:
    """All tokens at once, with temporaries as large as x or twice that."""
    if counted is not None:
        x = torch.where(counted.view(-1, 1, 1), x, 0)
    if statistic == "max-abs":
        return x.abs().amax(0).float()
    return x.float().square().sum(0) if statistic == "rms" else x.abs().sum(0, dtype=torch.float32)


def norm(x: Tensor, counted: Tensor | None, statistic: str) -> Tensor:
    """One kernel that casts as it reads, and with a mask a copy before it."""
    if counted is not None:
        x = torch.where(counted.view(-1, 1, 1), x, 0)
    order = float("inf") if statistic == "max-abs" else STATISTICS[statistic].power
    norms: Tensor = torch.linalg.vector_norm(x, order, dim=0, dtype=torch.float32)
    return norms.square() if statistic == "rms" else norms


def matmul(x: Tensor, counted: Tensor | None, statistic: str) -> Tensor:
    """Sums as a product with the token mask; a NaN that does not count would show."""
    weights = torch.ones(len(x), device=x.device, dtype=x.dtype) if counted is None else counted.to(x.dtype)
    values = x.square() if statistic == "rms" else x.abs()
    return (weights[None] @ values.flatten(1)).float().view(x.shape[1:])


@cache
def compiled_whole() -> Candidate:
    """`whole`, compiled when it is first called."""
    return torch.compile(whole, dynamic=False)


CANDIDATES: dict[str, Candidate] = {
    "reduce": lambda x, counted, statistic: STATISTICS[statistic].reduce(x, counted),
    "norm": norm,
    "whole": whole,
    "matmul": matmul,
    "compiled": lambda x, counted, statistic: compiled_whole()(x, counted, statistic),
}


@dataclass
class Result:
    """One measurement."""

    tokens: int
    tp: int
    statistic: str
    masked: bool
    candidate: str
    seconds: float
    gb_per_s: float
    of_the_copy: float
    temporaries: float
    error: float
    """Largest relative difference from fp64, on the first tokens."""


def copy_gb_per_s(num_bytes: int, *, repeats: int) -> float:
    """What a copy of so many bytes reads and writes a second."""
    source = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), repeats=repeats) / 1e9


def inputs(layout: QKVLayout, *, tokens: int, tp: int, dtype: torch.dtype) -> list[Tensor]:
    """Views of Q and K [tokens, groups, channels] in fused outputs, so many that the cache holds none of them."""
    rows = layout.rows_per_partition(tp)
    (block,) = qk_blocks(layout.local_qk_ranges(0, tp))
    num_bytes = tokens * rows * dtype.itemsize
    count = -(-BEYOND_THE_CACHE // num_bytes) if ON_GPU else 1
    return [block.of(torch.randn(tokens, rows, device=DEVICE, dtype=dtype)) for _ in range(count)]


def error(candidate: Candidate, x: Tensor, counted: Tensor | None, statistic: str) -> float:
    """Largest relative difference from fp64 on at most 4,096 tokens."""
    x, counted = x[:4096], None if counted is None else counted[:4096]
    values = (x if counted is None else x[counted]).double().abs()
    wanted = {"mean-abs": values.sum, "rms": values.square().sum, "max-abs": values.amax}[statistic](0)
    return float(((candidate(x, counted, statistic).double() - wanted) / wanted).abs().max())


def measure(args: argparse.Namespace) -> tuple[float, list[Result]]:
    """Copy bandwidth in GB/s, and each candidate at each size."""
    layout = QKVLayout(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
    )
    copy = copy_gb_per_s(COPY_BYTES if ON_GPU else 2**26, repeats=args.repeats)
    results = []
    for tokens, tp in product(args.tokens, args.tensor_model_parallel_size):
        xs = inputs(layout, tokens=tokens, tp=tp, dtype=DTYPES[args.dtype])
        read = xs[0].numel() * xs[0].element_size()
        some = torch.arange(tokens, device=DEVICE) % 8 != 7
        for statistic, masked, name in product(STATISTICS, (False, True), args.candidates):
            candidate = CANDIDATES[name]
            if name == "compiled":
                torch._dynamo.reset()  # after a few shapes it would run uncompiled without a sign
            if name == "matmul" and statistic == "max-abs":
                continue
            counted, turns = some if masked else None, cycle(xs)

            def action(c: Candidate = candidate, m: Tensor | None = counted, s: str = statistic, t: Any = turns) -> Any:
                return c(next(t), m, s)

            took = seconds(action, repeats=args.repeats)
            speed = read / took / 1e9
            off, share = error(candidate, xs[0], counted, statistic), peak_bytes(action) / read
            results.append(Result(tokens, tp, statistic, masked, name, took, speed, speed / copy, share, off))
    return copy, results


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    lines = [
        "| tokens | TP | statistic | masked | | GB/s read | of the copy | temporaries | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.tokens:,} | {r.tp} | {r.statistic} | {'yes' if r.masked else 'no'} | {r.candidate} | {r.gb_per_s:.1f} "
        f"| {r.of_the_copy:.0%} | {r.temporaries:.1%} | {r.error:.0e} |"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--tensor-model-parallel-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num-attention-heads", type=int, default=32)
    parser.add_argument("--num-query-groups", type=int, default=8)
    parser.add_argument("--kv-channels", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["reduce", "norm", "whole", "matmul"])
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    add_overwrite_arg(parser)
    args = parser.parse_args()
    if end_in_one_line("benchmark_capture", lambda: check_new(args.output, overwrite=args.overwrite)):
        sys.exit(1)
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    copy, results = measure(args)
    print(f"{device}, torch {torch.__version__}: a copy reads and writes {copy:.1f} GB/s\n\n{table(results)}")
    if args.output:
        flags = {name: str(value) for name, value in vars(args).items()}
        machine = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
        numbers = {**machine, "flags": flags, "copy_gb_per_s": copy, "results": [asdict(r) for r in results]}
        args.output.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
