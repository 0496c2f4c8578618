"""The RL program: GRPO and its kin on Megatron's own training step. To be started by the launcher, `longact train`."""

import sys

from megatron_longact.versions import check_programs


def main() -> None:
    """Run until `--train-iters`; a mistake in the flags ends it before anything is trained."""
    check_programs("the RL program")
    # Imported here: a checkpoint writer spawns a process that imports this file, and needs no Megatron.
    from megatron_longact.megatron.checkpoint_model import validated_args
    from megatron_longact.rl.arguments import add_rl_args, rl_config_from_args
    from megatron_longact.rl.program import environment_of, run
    from megatron_longact.rl.run_folder import megatron_output

    with megatron_output(sys.argv[1:]) as terminal:
        args = validated_args(add_rl_args)
        config = rl_config_from_args(args)

        def say(line: str) -> None:
            if args.rank == 0:
                print(line, file=terminal)

        for remark in config.remarks:
            say(remark)
        run(args, config, environment_of(config, say=say), terminal=terminal)


if __name__ == "__main__":
    main()
