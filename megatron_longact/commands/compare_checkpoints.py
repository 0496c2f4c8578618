"""Compare two Megatron torch_dist checkpoints bit by bit: every tensor, and what the schedulers' state carries.

    longact compare-checkpoints runs/a/checkpoints/iter_0000010 runs/b/checkpoints/iter_0000010

Weights, optimizer moments, LongAct's state and the RL program's are compared; random-generator and rerun state,
which holds process ids and times, is not. Moments are compared where `--dist-ckpt-optim-fully-reshardable` saved them
by parameter: the distributed optimizer's flat buffers have padding in them that nobody ever wrote. Exits with 1 and
the names of what differs if anything does.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

NOT_COMPARED = ("rng_state", "rerun_state_machine", "common_state", "gbuf_idx")


def read_tensors(iteration: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of one iteration's folder, whole, by Megatron's names."""
    tensors: dict[str, Any] = {}
    _load_state_dict(tensors, FileSystemReader(iteration), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    kept = {
        name: value
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and not any(part in name for part in NOT_COMPARED)
    }
    if not kept:
        raise ValueError(f"{iteration} holds no tensor")
    return kept


def read_scheduler(iteration: Path) -> dict[str, Any]:
    """The scheduler's state, which carries LongAct's and the RL program's."""
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    with warnings.catch_warnings(action="ignore"):  # that no process group is there is as it should be
        state: dict[str, Any] = load_common_state_dict(iteration)["opt_param_scheduler"]
    return state


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Paths at which two nested structures differ; tensors by their bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys(), key=str):
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: in one only"
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{where}: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        elif not torch.equal(a, b):
            yield f"{where}: {int((a != b).sum())} of {a.numel()} elements"
    elif type(a) is not type(b) or a != b:
        yield f"{where}: {a!r} and {b!r}"


def compare(a: Path, b: Path) -> list[str]:
    """What differs between two iterations' folders; nothing if they are equal to the bit."""
    return [
        *differences(read_tensors(a), read_tensors(b), "tensors"),
        *differences(read_scheduler(a), read_scheduler(b), "opt_param_scheduler"),
    ]


def main(argv: list[str]) -> int:
    """Print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="folder of one iteration")
    parser.add_argument("b", type=Path)
    args = parser.parse_args(argv)
    for folder in (args.a, args.b):
        if not (folder / "metadata.json").is_file():
            parser.error(f"{folder} is not a complete torch_dist checkpoint of one iteration: it has no metadata.json")
    found = compare(args.a, args.b)
    names = read_tensors(args.a)
    moments = sum("exp_avg" in name for name in names)
    equal = f"equal to the bit: {len(names)} tensors, {moments} of them moments, and the scheduler's state"
    print("\n".join(found) or equal)
    return 1 if found else 0
