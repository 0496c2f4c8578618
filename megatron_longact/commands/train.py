"""GRPO and its kin on Megatron's own training step; the flags are those of docs/program-flags.md.

    longact train --cpu --longact ...
    torchrun --standalone --nproc-per-node 8 -m megatron_longact train --longact ...

The same as `python -m megatron_longact.run [--cpu] [--verbose] -m megatron_longact.rl.train ...`. From a Hugging Face
folder to a trained one, in one go, which is called again to go on (docs/quickstart.md):

    longact train --hf-dir IN --data FILE_OR_SPEC --save OUT ...
"""

from itertools import takewhile

from megatron_longact import run
from megatron_longact.megatron.tool_command import end_in_one_line, keep_own_store
from megatron_longact.versions import check_programs


def main(argv: list[str]) -> int:
    """Train; the exit status of the launcher."""
    ended: list[int] = []

    def before_a_launch() -> None:
        check_programs("the RL program")
        if "--hf-dir" in {word.partition("=")[0] for word in argv}:
            from megatron_longact.commands import from_hf

            ended.append(from_hf.main(argv))

    if {"-h", "--help"} & set(argv):
        print(__doc__)
    status = end_in_one_line("train", before_a_launch)
    if status or ended:
        return status or ended[0]
    keep_own_store()
    return run.main(launched(argv))


def launched(argv: list[str]) -> list[str]:
    """The launcher's arguments: its own, which come first, the program, and the program's."""
    own = [*takewhile(lambda word: word in ("--cpu", "--verbose"), argv)]
    return [*own, "-m", "megatron_longact.rl.train", *argv[len(own) :]]
