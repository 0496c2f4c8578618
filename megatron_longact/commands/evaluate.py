r"""Evaluate a checkpoint, or score predictions, on RULER, LongBench v2, InfiniteBench or the needle tasks.

Score predictions that are there already, without Megatron:

    longact evaluate --benchmark ruler --predictions FILE_OR_FOLDER [--data SAMPLES]
    longact evaluate --benchmark longbench-v2 --predictions FILE [--data data.json]
    longact evaluate --benchmark infinitebench --predictions FOLDER [--data FOLDER]

Let a Megatron checkpoint answer, with the flags of its model, then score (a killed evaluation goes on):

    torchrun --standalone --nproc-per-node 2 -m megatron_longact evaluate --benchmark ruler --lengths 4096 8192 \
        --load CHECKPOINTS --tensor-model-parallel-size 2 ...

Results are in --output (default: runs/evaluation): results.json, scores.png and, with --load, predictions.jsonl.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_longact.megatron.tool_command import become_megatron_program, check_folder, end_in_one_line


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
    from megatron_longact.evaluation.prediction_log import PREDICTIONS, SETTINGS

    add_evaluation_args(parser)
    args, others = parser.parse_known_args(argv)
    if args.predictions is not None and others:
        parser.error(f"unknown with --predictions: {' '.join(others)}")

    def action() -> None:
        config = config_from_args(args)
        check_folder(config.output, flag="--output")
        if args.predictions is not None:
            from megatron_longact.evaluation.scoring import check_replaces, score_file

            if not args.overwrite:
                check_replaces(config.output, args.predictions)
            score_file(config, args.predictions, terminal=sys.stdout)
            return
        if args.overwrite and os.environ.get("RANK", "0") == "0":  # else it goes on with what is there
            for name in (PREDICTIONS, SETTINGS):
                (config.output / name).unlink(missing_ok=True)
        become_megatron_program([argument for argument in argv if argument != "--cpu"], cpu=args.cpu)
        from megatron_longact.evaluation import program

        program.main()

    return end_in_one_line("evaluate", action)
