"""What other libraries say while they are imported and set up: left out of the terminal, unless it is asked for.

LONGACT_VERBOSE=1 shows everything, and so does the launcher's `--verbose`; so do Python's own `-W` and PYTHONWARNINGS,
as far as they say so. Errors, and what a program itself prints while it trains, are never left out.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from typing import Any

VERBOSE = "LONGACT_VERBOSE"
_LIBRARIES = ("torch", "megatron", "transformer_engine", "transformers", "apex", "modelopt")


def verbose() -> bool:
    """Whether everything is to be shown."""
    return bool(os.environ.get(VERBOSE))


def quiet_libraries() -> None:
    """Leave out the warnings of torch, Megatron and the like, of child processes too; to be called before they load."""
    if verbose() or sys.warnoptions:
        return
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning,ignore::FutureWarning")  # checkpoint writers
    os.environ.setdefault("TORCH_LOGS", "-all")


@contextmanager
def quiet_program() -> Iterator[None]:
    """While this is open, a Megatron program does not list its arguments, nor log how it sets itself up.

    A program that sends its output into a file has the list there; `--logging-level` decides what is logged.
    """
    if verbose():
        yield
        return
    from megatron.training import arguments, checkpointing

    logger, terminal = logging.getLogger("megatron"), _output()
    level, listing, taking = logger.level, arguments._print_args, checkpointing.load_args_from_checkpoint
    arguments._print_args = _left_out(listing, terminal)
    checkpointing.load_args_from_checkpoint = _left_out(taking, terminal)
    if (
        "megatron_longact.megatron.cpu" in sys.modules
    ):  # there the CPU's generator is the GPU's, and each step warns of it
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    if not any(argument.startswith("--logging-level") for argument in sys.argv):
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        arguments._print_args, checkpointing.load_args_from_checkpoint = listing, taking
        logger.setLevel(level)


def _left_out(original: Callable[..., Any], terminal: tuple[int, int]) -> Callable[..., Any]:
    """`original` without what it prints on the terminal."""

    @wraps(original)
    def without_output(*args: Any, **kwargs: Any) -> Any:
        if _output() != terminal:
            return original(*args, **kwargs)
        with redirect_stdout(io.StringIO()):
            return original(*args, **kwargs)

    return without_output


def _output() -> tuple[int, int]:
    """What file descriptor 1 is."""
    status = os.fstat(1)
    return status.st_dev, status.st_ino
