"""Evaluate a checkpoint, or score predictions, on RULER or LongBench v2.

Score predictions that are there already, without Megatron:

    python tools/evaluate.py --benchmark ruler --predictions FILE_OR_FOLDER [--data SAMPLES]
    python tools/evaluate.py --benchmark longbench-v2 --predictions FILE [--data data.json]

Let a Megatron checkpoint answer, with the flags of its model, then score (a killed evaluation goes on):

    torchrun --nproc-per-node 2 tools/evaluate.py --benchmark ruler --lengths 4096 8192 --load CHECKPOINTS \
        --tensor-model-parallel-size 2 ...

Results are in --output (default: runs/evaluation): results.json, scores.png and, with --load, predictions.jsonl.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from pathlib import Path


def main(argv: list[str]) -> int:
    """Score or evaluate; the exit status: 2 for flags that make no sense, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--load", type=Path, help="A Megatron checkpoint to evaluate; Megatron's own flags go with it.")
    what.add_argument("--predictions", type=Path, help="Predictions to score: a JSON-lines file, or a folder of them.")
    parser.add_argument(
        "--cpu", action="store_true", help="Run Megatron on the CPU; without a GPU that happens by itself."
    )

    from megatron_longact.evaluation.arguments import add_evaluation_args, config_from_args

    add_evaluation_args(parser)
    args, others = parser.parse_known_args(argv)
    if args.predictions is not None and others:
        parser.error(f"unknown with --predictions: {' '.join(others)}")
    try:
        config = config_from_args(args)
        if args.predictions is not None:
            from megatron_longact.evaluation.scoring import score_file

            score_file(config, args.predictions, terminal=sys.stdout)
        else:
            _run_megatron([argument for argument in argv if argument != "--cpu"], cpu=args.cpu)
    except ValueError as error:
        if not _is_refusal(error):
            raise
        _say_once(str(error))
        return 1
    return 0


def _run_megatron(argv: list[str], *, cpu: bool) -> None:
    import torch

    sys.argv[1:] = argv
    if cpu or torch.cuda.device_count() == 0:
        from megatron_longact import cpu as cpu_mode

        cpu_mode.enable_cpu_mode()
        sys.argv += cpu_mode.missing_cpu_flags(argv)
    if "MASTER_ADDR" not in os.environ:  # one process, without torchrun
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    from megatron_longact.evaluation import program

    program.main()


def _free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def _is_refusal(error: ValueError) -> bool:
    """Whether this package raised it; one from anywhere else is a crash."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("megatron_longact.")


def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print("evaluate:", " ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun ends all ranks when the first one ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
