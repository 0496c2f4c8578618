"""GRPO on needle tasks over long contexts, on Megatron's own engine.

    torchrun --standalone --nproc-per-node 2 -m megatron_longact.run --cpu examples/train_grpo.py --longact ...

`examples/demo/run.sh` is a complete command. Without `--longact` every row of Q and K trains.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Run until `--train-iters`; a mistake in the flags ends it before anything is trained."""
    # Imported here: a checkpoint writer spawns a process that imports this file, and needs no Megatron.
    from megatron.training.arguments import parse_and_validate_args

    from megatron_longact.rl.arguments import add_rl_args, rl_config_from_args
    from megatron_longact.rl.program import environment_of, run
    from megatron_longact.rl.reports.run_log import MEGATRON_LOG, output_in_file

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--run-dir", type=Path, default=Path("."))
    run_dir = early.parse_known_args()[0].run_dir
    with output_in_file(run_dir / MEGATRON_LOG) as terminal:
        args = parse_and_validate_args(extra_args_provider=add_rl_args)
        config = rl_config_from_args(args)

        def say(line: str) -> None:
            if args.rank == 0:
                print(line, file=terminal)

        for remark in config.remarks:
            say(remark)
        run(args, config, environment_of(config, say=say), terminal=terminal)


if __name__ == "__main__":
    main()
