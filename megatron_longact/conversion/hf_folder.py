"""A Hugging Face folder: its safetensors files, held against the tensors that its config.json asks for."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_longact.conversion.mapping import Entry, HFTensor
from megatron_longact.conversion.safetensors_files import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NOT_WEIGHTS = "rotary_emb.inv_freq"
"""Old exports store this table beside the weights; models compute it themselves."""
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a folder, by name."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "HFFolder":
        """Read all headers.

        Raises `ValueError` with one line, and a tensor's name where one is concerned, for a folder without
        safetensors, a missing or truncated file, and an index that says something else than its files.
        """
        if (path / INDEX).is_file():
            return cls(path, _indexed(path))
        if (path / SINGLE).is_file():
            return cls(path, read_header(path / SINGLE)[0])
        if not path.is_dir():
            raise ValueError(f"{path} is no folder")
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind))
        hint = f"; {pickles[0]} is a pickle, which is never loaded: save it as safetensors first" if pickles else ""
        raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}{hint}")

    def check(self, entries: Iterable[Entry], *, tied: bool) -> None:
        """Raise `ValueError` with the name of a tensor that is missing, too many, or of another shape or dtype."""
        wanted = {tensor.name: tensor for entry in entries for tensor in entry.hf}
        for tensor in wanted.values():
            self._check_tensor(tensor)
        for name, stored in self.tensors.items():
            if name in wanted or name.endswith(_NOT_WEIGHTS) or (tied and self._is_tied_copy(name)):
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


def _indexed(path: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(Path(file).name, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path / INDEX}: {error}") from error
    tensors = {}
    for file, names in sorted(by_file.items()):
        if not (path / file).is_file():
            raise ValueError(f"{path / file} is missing; {INDEX} says that it holds {names[0]}")
        header, _ = read_header(path / file)
        for name in names:
            if name not in header:
                raise ValueError(f"{path / file} has no {name}, though {INDEX} says so")
        tensors.update(header)
    return tensors


def companions(path: Path) -> list[Path]:
    """The files beside the weights that a copy of the model needs: tokenizer, generation settings."""
    found = {file for pattern in _COMPANIONS for file in path.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken"))


def copy_companions(source: Path, target: Path) -> None:
    """Copy config.json and everything of `companions`."""
    for file in (source / "config.json", *companions(source)):
        shutil.copyfile(file, target / file.name)
