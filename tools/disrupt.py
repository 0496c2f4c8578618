"""Replace the activations of high, low or random Q and K channels, and see what the model loses.

The channels are measured on prompts of the very tasks (or taken from LongAct's masks: --mask), replaced by their mean
(or zero, or noise) at the output of linear_qkv, and the model is asked: accuracy by context length, repetition,
perplexity of text, beside the undisturbed model. Megatron's own flags of the model go with it:

    source examples/demo/model_args.sh
    python tools/disrupt.py --load examples/demo/start_checkpoint "${MODEL_ARGS[@]}"
    torchrun --nproc-per-node 2 tools/disrupt.py --load CHECKPOINTS --tensor-model-parallel-size 2 \
        --benchmark ruler --tasks niah_single_1 vt --lengths 4096 8192 ...

Results are in --output (default: runs/disrupt): results.json, responses.jsonl, samples.md, disruption.png.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the analysis; the exit status: 2 for flags that make no sense, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="A Megatron checkpoint; Megatron's flags go with it.")
    parser.add_argument("--cpu", action="store_true", help="Run on the CPU; without a GPU that happens by itself.")

    from megatron_longact.analysis.disrupt_arguments import add_disrupt_args, config_from_args

    try:
        args, _ = add_disrupt_args(parser).parse_known_args(argv)
        config_from_args(args)
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
    from megatron_longact.analysis import disrupt_program

    disrupt_program.main()


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
        print("disrupt:", " ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun ends all ranks when the first one ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
