"""Whether LongAct attaches in a trainer that is installed here, by which setting, and what is known not to work.

    longact compat --trainer verl

Exit status 0 if it attaches; 1, with one line that says why, if it does not. docs/integrations.md has the rest.
"""

import argparse
import runpy

from megatron_longact.megatron.tool_command import end_in_one_line
from megatron_longact.trainers import TRAINERS, look, package_folder


def main(argv: list[str]) -> int:
    """Look and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", required=True, type=_name, choices=TRAINERS, help="its name")
    args = parser.parse_args(argv)

    def action() -> None:
        print(look(TRAINERS[args.trainer], megatron=_megatron()))

    return end_in_one_line("compat", action)


def _name(given: str) -> str:
    """As TRAINERS has it: case, - and _ do not matter, nor does the ms- of ms-swift."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    return next(
        (name for name in TRAINERS if plain(name).removeprefix("ms-") == plain(given).removeprefix("ms-")), given
    )


def _megatron() -> str | None:
    """Megatron's version, from its own file: importing Megatron takes seconds, and fails in a broken environment."""
    folder = package_folder("megatron.core")
    return None if folder is None else str(runpy.run_path(str(folder / "package_info.py"))["__version__"])
