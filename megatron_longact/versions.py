"""What differs between versions of Megatron, and the version in which each difference ends.

| part | works with megatron-core |
|---|---|
| the library: `LongAct.attach` and all that it does | 0.16.1 and newer |
| the launcher, in programs built on `megatron.training` | 0.17 and newer |
| RL program, evaluation, analysis, conversion | 0.19 |

| what an older one does otherwise | ends with |
|---|---|
| `cuda_graph_modules` is called `cuda_graph_scope`, and `full` in it means whole layers (`refusals`) | 0.18 |
| no `megatron.training` in the wheel: a checkout has it (the launcher) | 0.17 |
| `argument_utils.gpt_config_from_args` is not there: `seams_here` | 0.19 |
| `initialize_megatron` parses, by a name of its own: `seams_here` | 0.18 |
| `train` sets `finalize_model_grads_func` whatever the config has (`megatron.seams`) | 0.19 |
| bf16 steps are never skipped (`grad_norm_skip_threshold` is not there); nothing to do | 0.18 |
"""

import logging
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Version(NamedTuple):
    """The two numbers that say what Megatron has."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = Version(0, 16)
NEWEST_TESTED = Version(0, 19)
OLDEST_OF_LAUNCHER = Version(0, 17)
OLDEST_OF_PROGRAMS = Version(0, 19)
"""RL program, evaluation, analysis, conversion."""


def version_of(text: str) -> Version:
    """Of Megatron's own `__version__`, such as 0.19.2 or 0.16.0rc0."""
    major, minor = re.findall(r"\d+", text)[:2]
    return Version(int(major), int(minor))


def installed() -> Version:
    """The version that an import finds."""
    import megatron.core  # not above: `longact compat` has to say it where there is none

    return version_of(megatron.core.__version__)


def package_info() -> Path | None:
    """The file that says its version where an import would find Megatron, which may lie beside a program."""
    found = (Path(folder, "megatron", "core", "package_info.py") for folder in sys.path)
    return next(filter(Path.is_file, found), None)


def check_programs(what: str) -> None:
    """Raise ValueError for a Megatron that `what` does not work with; imports nothing."""
    info = package_info()
    if info is not None and (found := version_in(info)) < OLDEST_OF_PROGRAMS:
        raise ValueError(
            f"this is megatron-core {found}; {what} needs {OLDEST_OF_PROGRAMS} or newer: LongAct itself, attached to a "
            f"program, works from {OLDEST} on (docs/support.md)"
        )


def version_in(info: Path) -> Version:
    """What a package_info.py says."""
    numbers = re.findall(r"^(?:MAJOR|MINOR) = (\d+)", info.read_text(), re.MULTILINE)
    return version_of(".".join(numbers))


def check_version(found: Version) -> str | None:
    """What to warn of; None for a version that is tested. Raises ValueError for one that is too old."""
    if found < OLDEST:
        raise ValueError(f"this is megatron-core {found}; LongAct needs {OLDEST} or newer")
    if found > NEWEST_TESTED:
        return f"LongAct is tested with megatron-core {OLDEST} to {NEWEST_TESTED}, and this is {found}"
    return None


@cache
def warn_if_untested() -> None:
    """Log `check_version` of the one that is installed, once a process."""
    warning = check_version(installed())
    if warning is not None:
        logger.warning("%s", warning)


def seams_here(module: ModuleType, *names: str) -> list[str]:
    """Those of a module's functions that this version has."""
    return [name for name in names if hasattr(module, name)]
