"""Where a step's time goes: a torch profile of a few steps with LongAct's ranges named, a trace and a table.

    torchrun --standalone --nproc-per-node 1 tools/profile_step.py --hidden-size 512 --num-layers 4 --output trace.json

The model and its flags are those of tools/benchmark_overhead.py. The trace opens in Perfetto or chrome://tracing. With
a GPU the ranges are NVTX ranges too, and `device` is the time of the kernels that were launched inside one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_overhead import add_model_args, build, check_model_args, initialise
from measuring import ON_GPU
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_longact import LongAct, LongActConfig
from megatron_longact.megatron.tool_command import add_overwrite_arg, check_new, end_in_one_line
from megatron_longact.metrics import RANGES

STEP = "step"


def run(args: argparse.Namespace) -> profile:
    """Profile `args.steps` steps at refresh interval 1, after two that are not recorded."""
    model = build(args, hidden_size=args.hidden_size[0], seq_length=args.seq_length[0])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with LongAct.attach(model.chunks, model.optimizer, LongActConfig()):
        for _ in range(2):
            model.step()
        with profile(activities=activities) as recorded:
            for _ in range(args.steps):
                with record_function(STEP):
                    model.step()
    return recorded


def table(recorded: profile, *, steps: int) -> str:
    """Each range's calls and milliseconds a step, and its share of the step, in Markdown."""
    events = {event.key: event for event in recorded.key_averages() if not _is_kernel(event)}
    names = [name for name in (STEP, *RANGES) if name in events]
    header = ["| range | calls | host ms | share |", "|---|---|---|---|"]
    if ON_GPU:
        header = ["| range | calls | host ms | share | device ms | share |", "|---|---|---|---|---|---|"]
    lines = []
    for name in names:
        event, whole = events[name], events[STEP]
        cells = [name, f"{event.count / steps:g}", *_cells(event.cpu_time_total, whole.cpu_time_total, steps)]
        if ON_GPU:
            cells += _cells(event.device_time_total, whole.device_time_total, steps)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(header + lines)


def _is_kernel(event: Any) -> bool:
    """A range appears a second time, on the device's own line, under the same name."""
    return bool(event.device_type != torch.autograd.DeviceType.CPU)


def _cells(microseconds: float, whole: float, steps: int) -> list[str]:
    return [f"{microseconds / steps / 1000:.3f}", f"{microseconds / whole:.2%}" if whole else ""]


def main() -> None:
    """Profile, print the table, and write the trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_args(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, help="trace in Chrome's format, of rank 0")
    add_overwrite_arg(parser)
    args = parser.parse_args()
    if end_in_one_line("profile_step", lambda: check_new(args.output, overwrite=args.overwrite)):
        sys.exit(1)
    check_model_args(parser, args)
    initialise(args)
    recorded = run(args)
    if torch.distributed.get_rank() == 0:
        print(table(recorded, steps=args.steps))
        if args.output:
            recorded.export_chrome_trace(str(args.output))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
