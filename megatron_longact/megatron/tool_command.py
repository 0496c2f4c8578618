"""What the tools share: a user's mistake ends them with one line, and they start Megatron by themselves."""

import errno
import os
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_longact.flags import add_groups
from megatron_longact.versions import check_programs

_STORES: list[Any] = []
_OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT),
}
"""Errors of the system that say all of themselves."""


def end_in_one_line(tool: str, action: Callable[[], None]) -> int:
    """The exit status of a tool: 0; or 1 with one line on stderr.

    For a `ValueError` of this package, from rank 0, and for a file or folder that the system does not let it have.
    """
    try:
        action()
        end_together()
    except ValueError as error:
        if not is_refusal(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{tool}:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all ranks when the first one ends
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # the disk may be another one, so this rank speaks too if the first one does not
        where = "" if error.filename is None else f"{error.filename}: "  # a disk that is full says no name
        print(f"{tool}: {where}{error.strerror}", file=sys.stderr, flush=True)
        return 1
    return 0


def tool_flags(argv: list[str], groups: dict[str, type], *, about: str | None) -> tuple[Namespace, list[str]]:
    """What a tool's command line says: its own flags, by group, and `--overwrite`; and the rest, which is Megatron's.

    about: the tool's docstring, as `--help` shows it.
    """
    parser = ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add_groups(parser, groups)
    add_overwrite_arg(parser)
    return parser.parse_known_args(argv)


def add_overwrite_arg(parser: ArgumentParser) -> None:
    """Add `--overwrite`, for `check_new`."""
    parser.add_argument("--overwrite", action="store_true", help="Replace the results that an earlier call left there.")


def check_new(results: Path | None, *, overwrite: bool, flag: str = "--output") -> None:
    """`check_file`, and `ValueError` if an earlier call has left its results there."""
    check_file(results, flag=flag)
    if results is not None and not overwrite and results.exists():
        raise ValueError(f"{results} is there already: give another {flag}, or --overwrite to replace it")


def check_file(file: Path | None, *, flag: str) -> None:
    """Raise `ValueError` if no file can be written there; flag: the one that names another place."""
    if file is None:
        return
    check_folder(file.parent, flag=flag)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file as {flag}")


def check_folder(folder: Path, *, flag: str) -> None:
    """Raise `ValueError` if there is a file where a folder is to be, or nothing can be written into it."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is a file: {flag} needs a folder there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written into: give another {flag}")


def end_together() -> None:
    """Wait for the other ranks, then leave them: one that closes its connections early breaks the others' last call."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def is_refusal(error: Exception) -> bool:
    """Whether it is a `ValueError` that this package raised itself; one from anywhere else is a crash."""
    if not isinstance(error, ValueError):
        return False
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("megatron_longact.")


def become_megatron_program(argv: list[str], *, cpu: bool) -> None:
    """Set this process up for Megatron's parser, which reads `sys.argv`; see `megatron_flags`."""
    sys.argv[1:] = megatron_flags(argv, cpu=cpu)


def megatron_flags(flags: list[str], *, cpu: bool) -> list[str]:
    """Flags for Megatron, with what a CPU run needs, which is switched on; and an address for a process alone.

    cpu: run on the CPU, which without a GPU happens by itself. Call it before Megatron is imported.
    """
    check_programs("this command")
    import torch

    from megatron_longact.megatron import apex, dataset_helpers

    keep_own_store()
    gpu = not cpu and torch.cuda.device_count() > 0
    remark = apex.settle(flags, gpu=gpu)
    if remark and os.environ.get("RANK", "0") == "0":
        print(remark, file=sys.stderr)
    if gpu:
        dataset_helpers.keep_what_is_built(of_any_megatron=False)
        return flags
    from megatron_longact.megatron import cpu as cpu_mode

    cpu_mode.enable_cpu_mode()
    return flags + cpu_mode.missing_cpu_flags(flags)


def keep_own_store() -> None:
    """Without torchrun keep a store until the process ends, as it does: on a port that the system picks."""
    if "MASTER_ADDR" in os.environ:
        return
    import torch.distributed as dist

    _STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True))  # type: ignore[attr-defined]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_STORES[-1].port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
