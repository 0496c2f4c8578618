"""Are the machines of a job fit for it? GPUs, NVLink, all-reduce, Transformer Engine, disk, checkpoints, flags.

    torchrun --standalone --nproc-per-node 8 -m megatron_longact preflight --require-gpu --save DIR -- FLAGS OF THE RUN
    srun ... bash examples/slurm/rank.sh python tools/preflight.py ...     what examples/slurm does before each start

Prints one table: each check, the ranks, ok, failed or not here. Exit code 0; 1, with one line on stderr for each thing
that failed. Without a GPU what needs one is not here, which is an error only with --require-gpu.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_longact.preflight import disk, gpus, models, network, software
from megatron_longact.preflight.checks import Finding, examine, failures, table


def local_findings(args: argparse.Namespace, *, rank: int, local_rank: int, world_size: int) -> list[Finding]:
    """What a rank can see alone; checkpoints are read by the first one of each node."""
    flags, gpu = models.flags_of(args.program), args.require_gpu
    found = [
        examine("software", software.versions),
        examine("transformer engine", software.transformer_engine, required=gpu),
        examine(
            "gpus",
            lambda: gpus.gpus(wanted=args.ranks_per_node, kind=args.gpu, min_memory_gib=args.min_gpu_memory_gib),
            required=gpu,
        ),
        examine("gpu memory", lambda: gpus.memory(local_rank), required=gpu),
        examine("gpu health", lambda: gpus.health(local_rank)),
        examine("nvlink", lambda: gpus.nvlink(local_rank)),
        examine("layout", lambda: models.layout(flags, world_size=world_size)),
    ]
    if args.save is not None:
        found.append(examine("disk", lambda: disk.space(args.save, min_free_gb=args.min_free_gb)))
        speed = {"rank": rank, "mib": args.write_mib, "min_mb_s": args.min_write_mb_s}
        found.append(examine("write", lambda: disk.write_speed(args.save, **speed)))
    if local_rank == 0:
        found.append(examine("checkpoint", lambda: models.megatron_checkpoint(flags)))
        found.append(examine("hf checkpoint", lambda: models.hf_checkpoint(args.hf_dir, flags)))
    return found


def main(argv: list[str]) -> int:
    """Check on this rank, and print the table on the first one."""
    args = _parser().parse_args(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, node = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("SLURMD_NODENAME", socket.gethostname())
    who = f"rank {rank} on {node}"
    found = local_findings(args, rank=rank, local_rank=local_rank, world_size=world_size)
    with network.deadline(args.timeout_s, waits_for=f"{who} waits for the other ranks"):
        network.meet(rank=rank, world_size=world_size, timeout_s=args.timeout_s)
    with network.deadline(args.timeout_s, waits_for=f"{who} waits in an all-reduce"):
        size = {"mib": args.all_reduce_mib, "min_gb_s": args.min_all_reduce_gb_s}
        found.append(examine("all-reduce", lambda: network.all_reduce(**size, local_rank=local_rank)))
        gathered: list[tuple[str, list[Finding]]] = [("", [])] * world_size
        dist.all_gather_object(gathered, (node, found))
        dist.destroy_process_group()
    findings = [of_rank for _, of_rank in gathered]
    wrong = failures(findings, nodes=[name for name, _ in gathered])
    if rank == 0:
        print(table(findings), flush=True)
        for line in wrong:
            print(f"preflight: {line}", file=sys.stderr, flush=True)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--save", type=Path, help="the folder of checkpoints: its space, and how fast it is written")
    add("--hf-dir", type=Path, help="a Hugging Face folder, all of whose tensors are looked at (headers only)")
    add("--require-gpu", action="store_true", help="what is not here for want of a GPU has failed")
    add("--ranks-per-node", type=int, default=1, help="GPUs that a node must have (default: 1)")
    add("--gpu", default="", metavar="NAME", help="a part of the GPUs' name, H100 for example")
    add("--min-gpu-memory-gib", type=float, default=0.0, metavar="GIB")
    add("--min-all-reduce-gb-s", type=float, default=0.0, metavar="GB/S", help="bus bandwidth")
    add("--all-reduce-mib", type=int, default=64, metavar="MIB", help="size of the tensor (default: 64)")
    add("--min-free-gb", type=float, default=0.0, metavar="GB", help="free space of --save")
    add("--min-write-mb-s", type=float, default=0.0, metavar="MB/S", help="of each rank, all at once")
    add("--write-mib", type=int, default=64, metavar="MIB", help="size of the file (default: 64)")
    add("--timeout-s", type=float, default=180.0, help="for ranks to meet, and for the all-reduce (default: 180)")
    add("program", nargs="*", help="after --: the flags of the run")
    return parser
