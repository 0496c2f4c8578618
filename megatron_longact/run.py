"""The launcher: run any program built on `megatron.training`, unchanged, with LongAct's flags.

    torchrun ... -m megatron_longact.run [--cpu] [--verbose] SCRIPT ARGS...
    torchrun ... -m megatron_longact.run [--cpu] [--verbose] -m MODULE ARGS...

It does to a Megatron program what `coverage run` does to any program: the program runs as
`__main__`, with its own arguments and import path, while `seams.attached()` holds
Megatron's seams. Checkpoint writers spawn processes that import `__main__` again: while the program
runs that is the program, so the launcher is not in their way.

`--cpu` turns the CPU mode on (`megatron_longact.megatron.cpu`) and adds the flags it needs to the program's;
without a visible GPU that happens by itself, and one line says so.

`--verbose` shows what is otherwise left out: the list of Megatron's arguments, its log of its own setting up, and the
warnings of other libraries (`megatron_longact.megatron.quiet`).

How a run ends: with the program's own exit status; with 2 where the program cannot be started; with
1 and one line, from one rank, where LongAct refuses what the user asked for (a `ValueError` that the
package itself raised; LONGACT_TRACEBACK=1 shows where); otherwise with 1, the rank's traceback first
and an error file for torchrun, which then ends the other ranks.
"""

import faulthandler
import os
import runpy
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from megatron_longact.megatron import apex, dataset_helpers, quiet
from megatron_longact.megatron.tool_command import is_refusal
from megatron_longact.versions import OLDEST_OF_LAUNCHER, package_info, version_in

USAGE = "usage: python -m megatron_longact.run [--cpu] [--verbose] {SCRIPT | -m MODULE} ARGS..."
_END_WITHIN_S = 30
_FRAMES_OF_LAUNCHER = (__file__, "<frozen runpy>", runpy.__file__)


@dataclass(frozen=True)
class _Program:
    """What to run as `__main__`: a script's path, or a module's name."""

    name: str
    is_module: bool
    arguments: list[str]

    def set_path(self) -> None:
        """Set `sys.path[0]` as the interpreter would: before Megatron is imported, which may lie beside the script."""
        if not self.is_module:
            _keep_package_importable()
            sys.path[0] = os.path.dirname(os.path.realpath(self.name))

    def run(self) -> None:
        """Run it as the Python interpreter would, with `sys.argv` set."""
        sys.argv = [self.name, *self.arguments]
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(self.name, run_name="__main__")


class _UsageError(Exception):
    pass


def main(argv: list[str]) -> int:
    """Run the program that `argv` names; the exit status if the program did not set one itself."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        program, cpu = _parse(argv)
        quiet.quiet_libraries()
        gpu = _gpu_is_visible()
        program.set_path()
        _check_megatron()
    except _UsageError as error:
        _say_once(str(error))
        return 2
    remark = apex.settle(program.arguments, gpu=gpu and not cpu)
    if remark and _rank() == 0:
        print("megatron_longact:", remark, file=sys.stderr, flush=True)
    if cpu or not gpu:
        program = _in_cpu_mode(program, asked_for=cpu)
    return _run(program, gpu=gpu and not cpu)


def _parse(argv: list[str]) -> tuple[_Program, bool]:
    cpu = False
    for i, argument in enumerate(argv):
        if argument == "--cpu":
            cpu = True
        elif argument == "--verbose":
            os.environ[quiet.VERBOSE] = "1"
        elif argument == "-m":
            if i + 1 == len(argv):
                raise _UsageError(f"-m needs the name of a module; {USAGE}")
            return _Program(argv[i + 1], True, argv[i + 2 :]), cpu
        elif argument.startswith("-"):
            raise _UsageError(f"{argument} comes before SCRIPT, where only --cpu and --verbose may; {USAGE}")
        else:
            _check_readable(argument)
            return _Program(argument, False, argv[i + 1 :]), cpu
    raise _UsageError(f"no program given; {USAGE}")


def _check_readable(script: str) -> None:
    try:
        Path(script).open("rb").close()
    except OSError as error:
        raise _UsageError(f"cannot read the program {script!r}: {error.strerror}") from error


def _check_megatron() -> None:
    """Refuse a Megatron that is too old, where an import would find it: beside the script, or installed."""
    info = package_info()
    if info is not None and (found := version_in(info)) < OLDEST_OF_LAUNCHER:
        raise _UsageError(f"{info.parent} is Megatron {found}; LongAct's launcher needs {OLDEST_OF_LAUNCHER} or newer")


def _keep_package_importable() -> None:
    """Spawned processes get `sys.path`, and import the program, which may import this package."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path[1:]:
        sys.path.append(root)


def _gpu_is_visible() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def _in_cpu_mode(program: _Program, *, asked_for: bool) -> _Program:
    from megatron_longact.megatron import cpu

    if not asked_for and _rank() == 0:
        print("megatron_longact: no GPU is visible: CPU mode, over gloo", file=sys.stderr, flush=True)
    cpu.enable_cpu_mode()
    flags = cpu.missing_cpu_flags(program.arguments)
    return _Program(program.name, program.is_module, [*program.arguments, *flags])


def _run(program: _Program, *, gpu: bool) -> int:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    try:
        from megatron_longact.megatron import seams

        if gpu:
            dataset_helpers.keep_what_is_built(of_any_megatron=False)
        with seams.attached(), quiet.quiet_program():
            program.run()
    except Exception as error:
        if is_refusal(error) and not os.environ.get("LONGACT_TRACEBACK"):
            _say_once(str(error))
        else:
            error = error.with_traceback(_without_launcher(error.__traceback__))
            sys.excepthook(type(error), error, error.__traceback__)
            handler.record_exception(error)
        _end_soon()
        return 1
    return 0


def _without_launcher(frames: TracebackType | None) -> TracebackType | None:
    program = frames
    while program and program.tb_frame.f_code.co_filename in _FRAMES_OF_LAUNCHER:
        program = program.tb_next
    return program or frames


def _end_soon() -> None:
    """Leave after a crash even if a thread or a library hangs on the way out: torchrun waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    faulthandler.dump_traceback_later(_END_WITHIN_S, exit=True)


def _say_once(message: str) -> None:
    """Print one line on stderr, from the first rank that has something to say."""
    if _is_first_to_speak():
        print("megatron_longact:", " ".join(message.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun ends all ranks when the first one does


def _is_first_to_speak() -> bool:
    # The store that torchrun, or rank 0, keeps at MASTER_ADDR:MASTER_PORT. Without one nothing that
    # depends on the rank has happened yet, so all ranks have the same to say.
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        return _rank() == 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store.add(f"megatron_longact/said/{attempt}", 1) == 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
