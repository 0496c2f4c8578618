"""`longact`: every command of the package by its name.

longact COMMAND ...
torchrun --standalone --nproc-per-node N -m megatron_longact COMMAND ...     on several ranks, where (ranks) is said
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from megatron_longact.megatron.quiet import quiet_libraries

COMMANDS = {
    "train": ("train", "RL on Megatron's training step, with LongAct (--longact) or dense (ranks)"),
    "report": ("report", "one HTML page of a run that one can send"),
    "show": ("show", "what does the model say? The answers of an RL run, and why they are wrong"),
    "evaluate": ("evaluate", "ask a checkpoint RULER, LongBench v2, InfiniteBench, or score predictions (ranks)"),
    "observe": ("observe", "does this model have outliers in its queries and keys? (ranks)"),
    "stability": ("stability", "would a mask chosen once do? (ranks)"),
    "disrupt": ("disrupt", "what does the model lose without its loud, quiet or random channels? (ranks)"),
    "emulate-fp8": ("emulate_fp8", "would FP8 select other channels?"),
    "plan": ("plan", "what LongAct costs on a cluster, on paper"),
    "preflight": ("preflight", "are the machines of a job fit for it? (ranks)"),
    "convert to-megatron": ("convert_hf_to_megatron", "a Hugging Face folder becomes a Megatron checkpoint"),
    "convert to-hf": ("convert_megatron_to_hf", "a Megatron checkpoint becomes a Hugging Face folder"),
    "export-mask": ("export_mask", "masks and saliency out of a checkpoint, under Hugging Face names"),
    "audit": ("audit_update", "what a training changed, inside and outside the mask"),
    "compat": ("compat", "does LongAct attach in the trainer that is installed here, and by which setting?"),
    "compare-checkpoints": ("compare_checkpoints", "two Megatron checkpoints, bit by bit"),
}
"""By name: the module in `megatron_longact.commands`, and a line for the map."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` begins with; its exit status, or 2, with the map, where there is none."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"megatron-longact {_version()}")
        return 0
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        asked = [word for word in argv if word not in ("-h", "--help")]
        known = [name for name in COMMANDS if name.split()[: len(asked)] == asked]
        print(_map(known or list(COMMANDS)), file=sys.stdout if known else sys.stderr)
        if not known:
            print(f"longact: no command {' '.join(asked[:2])!r}", file=sys.stderr)
        return 0 if known and asked != argv else 2
    quiet_libraries()
    rest = argv[len(name.split()) :]
    sys.argv[:] = [f"longact {name}", *rest]
    status: int = import_module(f"megatron_longact.commands.{COMMANDS[name][0]}").main(rest)
    return status


def _version() -> str:
    try:
        return version("megatron-longact")
    except PackageNotFoundError:
        return "of a checkout, not installed"


def _map(names: list[str]) -> str:
    """A line for each command."""
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {COMMANDS[name][1]}" for name in names]
    return "\n".join([(__doc__ or "").strip(), "", *lines, "", "longact COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
