"""GRPO and its kin on Megatron's own training step; the flags are those of docs/program-flags.md.

    longact train --cpu --longact ...
    torchrun --standalone --nproc-per-node 8 -m megatron_longact train --longact ...

The same as `python -m megatron_longact.run [--cpu] [--verbose] -m megatron_longact.rl.train ...`.
"""

from itertools import takewhile

from megatron_longact import run
from megatron_longact.megatron.tool_command import end_in_one_line, keep_own_store
from megatron_longact.versions import check_programs


def main(argv: list[str]) -> int:
    """Train; the exit status of the launcher."""
    return end_in_one_line("train", lambda: check_programs("the RL program")) or _launch(argv)


def _launch(argv: list[str]) -> int:
    keep_own_store()
    return run.main(launched(argv))


def launched(argv: list[str]) -> list[str]:
    """The launcher's arguments: its own, which come first, the program, and the program's."""
    own = [*takewhile(lambda word: word in ("--cpu", "--verbose"), argv)]
    return [*own, "-m", "megatron_longact.rl.train", *argv[len(own) :]]
