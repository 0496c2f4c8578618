"""What does the model say? The answers of an RL run, running or finished, and why they are wrong.

    longact show runs/rl | less
    longact show runs/rl --heldout --wrong
    longact show runs/rl --heldout --prompt 3 --step all     # one prompt, evaluation by evaluation

RUN is a --run-dir of `longact train`, which writes some answers of each step (--log-rollouts, --log-heldout).
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_longact.flags import add_groups, config_from_flags
from megatron_longact.megatron.tool_command import end_in_one_line
from megatron_longact.rl.answer_pages import ShowFlags, pages


def main(argv: list[str]) -> int:
    """Show; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="Folder of the run.")
    add_groups(parser, {"answers": ShowFlags})
    args = parser.parse_args(argv)

    def action() -> None:
        try:
            for page in pages(args.run, config_from_flags(ShowFlags, args)):
                print(page, flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return end_in_one_line("show", action)
