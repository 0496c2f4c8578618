"""Megatron's compiled index builder, `megatron.core.datasets.helpers_cpp`: not built again where it is there.

`initialize_megatron` runs `make` in the folder of `megatron.core.datasets` and ends the program if that fails. A wheel
holds what `make` builds, and no Makefile. Source: `compile_helpers` of megatron/core/datasets/utils.py (0.19).
"""

import os
import sys


def keep_what_is_built(*, of_any_megatron: bool) -> None:
    """Let Megatron, which this imports, compile its helper only where that is not there.

    of_any_megatron: an installed wheel's will do for a checkout too; else a folder with a Makefile is left to `make`.
    """
    from megatron.core.datasets import utils

    compile_helpers = utils.compile_helpers
    makefile = os.path.join(os.path.dirname(os.path.abspath(utils.__file__)), "Makefile")

    def compile_unless_there() -> None:
        left_to_make = os.path.isfile(makefile) and not of_any_megatron
        if left_to_make or not _can_be_imported(sys.path if of_any_megatron else []):
            compile_helpers()

    utils.compile_helpers = compile_unless_there


def _can_be_imported(folders: list[str]) -> bool:
    """folders: where other Megatrons may lie, whose helper will do."""
    from megatron.core import datasets

    here = list(datasets.__path__)
    datasets.__path__ = [*here, *(os.path.join(folder, "megatron", "core", "datasets") for folder in folders)]
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return False
    finally:
        datasets.__path__ = here
    return True
