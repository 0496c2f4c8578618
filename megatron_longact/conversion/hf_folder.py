"""A Hugging Face folder: its safetensors files, held against the tensors that its config.json asks for."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_longact.conversion.mapping import Entry, HFTensor
from megatron_longact.safetensors_files import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NOT_WEIGHTS = "rotary_emb.inv_freq"
"""Old exports store this table beside the weights; models compute it themselves."""
ADAPTER = "adapter_config.json"
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".spm", ".vocab", ".py")
"""Kinds of files that belong to a model beside its weights."""
_COMPANION_NAMES = ("tokenizer*", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
_OF_THESE_WEIGHTS = (
    "config.json",
    "*.index.json",
    "adapter_*",
    "trainer_state.json",
    "*_results.json",
    "requirements.txt",
)
"""Not companions, whatever their kind."""


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a folder, by name."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "HFFolder":
        """Read all headers of the files that `transformers` would load: model.safetensors before an index.

        Raises `ValueError` with one line, and a tensor's name where one is concerned, for a folder without
        safetensors, a missing or truncated file, an adapter, and an index that says something else than its files.
        """
        if (path / ADAPTER).is_file():
            raise ValueError(
                f"{path} has an adapter ({ADAPTER}), which is not converted: merge it into the model first"
            )
        if (path / SINGLE).is_file():
            return cls(path, read_header(path / SINGLE)[0])
        if (path / INDEX).is_file():
            return cls(path, _indexed(path))
        if not path.is_dir():
            raise ValueError(f"{path} is no folder")
        raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}{_hint(path)}")

    def left_aside(self, aside: tuple[str, ...] = ()) -> list[str]:
        """What a conversion makes no use of, in lines to show: weights beside those that were read, other files."""
        lines = []
        if count := sum(name.startswith(aside) for name in self.tensors):
            lines.append(f"left aside: the {count} tensors of {' '.join(aside)}, which predict further tokens")
        if (self.path / SINGLE).is_file() and (self.path / INDEX).is_file():
            lines.append(f"{self.path} has {SINGLE} and {INDEX}: {SINGLE} was taken, as transformers does")
        used = {stored.path.relative_to(self.path).parts[0] for stored in self.tensors.values()}
        used |= {file.relative_to(self.path).parts[0] for file in companions(self.path)} | {"config.json", INDEX}
        others = sorted(file.name for file in self.path.iterdir() if file.name not in used and file.name[0] != ".")
        if others:
            shown = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
            lines.append(f"left aside in {self.path}: {shown}")
        return lines

    def check(self, entries: Iterable[Entry], *, tied: bool, aside: tuple[str, ...] = ()) -> None:
        """Raise `ValueError` with the name of a tensor that is missing, too many, or of another shape or dtype.

        aside: how the names of tensors begin that may be there and are not looked at.
        """
        wanted = {tensor.name: tensor for entry in entries for tensor in entry.hf}
        for tensor in wanted.values():
            self._check_tensor(tensor)
        for name, stored in self.tensors.items():
            if (
                name in wanted
                or name.endswith(_NOT_WEIGHTS)
                or name.startswith(aside)
                or (tied and self._is_tied_copy(name))
            ):
                continue
            raise ValueError(f"{stored.path}: {name} is one tensor too many: config.json asks for no such tensor")

    def _check_tensor(self, wanted: HFTensor) -> None:
        stored = self.tensors.get(wanted.name)
        if stored is None:
            raise ValueError(f"{self.path}: {wanted.name} is missing; config.json asks for it: {list(wanted.shape)}")
        if stored.shape != wanted.shape:
            raise ValueError(
                f"{stored.path}: {wanted.name} has shape {list(stored.shape)}; config.json asks for "
                f"{list(wanted.shape)}"
            )
        if stored.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{stored.path}: {wanted.name} is {stored.dtype}; converted are float32, bfloat16, float16"
            )

    def _is_tied_copy(self, name: str) -> bool:
        if name != "lm_head.weight":
            return False
        head, embedding = self.tensors[name], self.tensors["model.embed_tokens.weight"]
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return False
        step = max(1, (64 << 20) // max(1, head.nbytes // head.shape[0]))
        blocks = [slice(row, row + step) for row in range(0, head.shape[0], step)]
        return all(
            torch.equal(head.read(block).view(torch.uint8), embedding.read(block).view(torch.uint8)) for block in blocks
        )

    def dtype_of(self, tensors: Sequence[HFTensor]) -> torch.dtype:
        """Their common dtype; `ValueError` if they have several."""
        dtypes = {self.tensors[tensor.name].dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise ValueError(
                f"{self.path}: {tensors[0].name} and {tensors[-1].name} have several dtypes, {_names(dtypes)}: they "
                "would be parts of one Megatron tensor"
            )
        return dtypes.pop()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _hint(path: Path) -> str:
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if shards:
        return f"; {shards[0]} is there, but only {INDEX} says what belongs to the model: get it too"
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
    return f"; {pickles[0]} is a pickle, which is never loaded: save it as safetensors first" if pickles else ""


def _indexed(path: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(str(Path(file)), []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path / INDEX}: {error}") from error
    tensors: dict[str, StoredTensor] = {}
    for file, names in sorted(by_file.items()):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"{path / INDEX} says that {names[0]} is in {file}, which is outside of the folder")
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing; {INDEX} says that it holds {names[0]}")
        header, _ = read_header(path / file)
        for name in names:
            if name not in header:
                raise ValueError(f"{path / file} has no {name}, though {INDEX} says so")
        for name in tensors.keys() & header.keys():
            raise ValueError(f"{name} is in {tensors[name].path} and in {path / file}: which one is the model's?")
        tensors.update(header)
    return tensors


def companions(path: Path) -> list[Path]:
    """The files beside the weights that a copy of the model needs: tokenizer, generation settings, code, licence."""
    named = {file for pattern in _COMPANION_NAMES for file in path.glob(pattern)}
    found = named | {file for file in path.iterdir() if file.suffix in _COMPANIONS and file.name[0] != "."}
    others = {file for pattern in _OF_THESE_WEIGHTS for file in path.glob(pattern)}
    return sorted(file for file in found - others if file.is_file())


def copy_companions(source: Path, target: Path) -> None:
    """Copy config.json and everything of `companions`."""
    for file in (source / "config.json", *companions(source)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
