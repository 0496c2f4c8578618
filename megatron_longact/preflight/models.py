"""The flags of a run, held against its ranks and against the checkpoints that it starts from."""

import argparse
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_longact.preflight.checks import NotHereError

_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
TRACKER = "latest_checkpointed_iteration.txt"


def flags_of(program: Sequence[str]) -> Namespace:
    """Those of Megatron's flags that are checked here, out of a program's command; None where it has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in _SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in _LAYOUT:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=1)
    for flag in ("--load", "--pretrained-checkpoint"):
        parser.add_argument(flag)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--use-checkpoint-args", action="store_true")
    return parser.parse_known_args(list(program))[0]


def layout(flags: Namespace, *, world_size: int) -> str:
    """The ranks divide into model replicas, the heads into tensor-parallel shards."""
    tp, pp, cp = (getattr(flags, name) for name in _LAYOUT)
    said = f"TP {tp} x PP {pp} x CP {cp}"
    if world_size % (tp * pp * cp):
        raise ValueError(f"{world_size} ranks do not divide into replicas of {said} = {tp * pp * cp}")
    if flags.num_attention_heads and flags.num_attention_heads % tp:
        raise ValueError(f"--num-attention-heads {flags.num_attention_heads} does not divide by TP {tp}")
    if flags.num_layers and flags.num_layers % pp:
        raise ValueError(f"--num-layers {flags.num_layers} does not divide by PP {pp}")
    return f"{said} x DP {world_size // (tp * pp * cp)}"


def megatron_checkpoint(flags: Namespace) -> str:
    """`--load`, else `--pretrained-checkpoint`, holds a checkpoint, of the model that the flags describe."""
    folders = {"--load": flags.load, "--pretrained-checkpoint": flags.pretrained_checkpoint}
    given = {flag: Path(folder) for flag, folder in folders.items() if folder}
    if not given:
        raise NotHereError("the run starts from no checkpoint")
    found = [(flag, folder) for flag, folder in given.items() if (folder / TRACKER).is_file()]
    if not found:
        if flags.pretrained_checkpoint:
            raise ValueError(f"{flags.pretrained_checkpoint} of --pretrained-checkpoint holds no {TRACKER}")
        raise NotHereError(f"{flags.load} holds no checkpoint yet")
    with warnings.catch_warnings(action="ignore"):  # Megatron's, of kernel libraries that a CPU does not have
        from megatron_longact.megatron.checkpointing import check_model_shape, mend_tracker

    mend_tracker(flags.load)
    check_model_shape(flags)
    flag, folder = found[0]
    return f"starts from {(folder / TRACKER).read_text().strip()} of {flag} {folder}"


def hf_checkpoint(folder: Path | None, flags: Namespace) -> str:
    """Each tensor that config.json asks for is there, in its shape; and config.json says what the flags say."""
    if folder is None:
        raise NotHereError("no --hf-dir")
    from megatron_longact.conversion.megatron_args import model_args
    from megatron_longact.conversion.to_megatron import Conversion

    conversion = Conversion.check(folder)
    values = model_args(conversion.model)
    pairs = {name: (values[name], getattr(flags, name)) for name in _SHAPE}
    differ = [
        f"{name} {there} there, {here} here" for name, (there, here) in pairs.items() if here not in (None, there)
    ]
    if differ:
        raise ValueError(f"{folder} is a model of another shape: {', '.join(differ)}")
    return f"{conversion.model.model_type}, {len(conversion.folder.tensors)} tensors in {folder}"
