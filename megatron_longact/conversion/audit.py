"""What training changed: two Hugging Face folders, tensor by tensor, inside and outside LongAct's mask."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from megatron_longact.conversion.hf_config import read_hf_config
from megatron_longact.conversion.hf_folder import HFFolder
from megatron_longact.conversion.plan import table
from megatron_longact.safetensors_files import StoredTensor, read_header

_BLOCK_BYTES = 16 << 20


@dataclass
class Change:
    """What changed in one tensor. A row is an index of its first axis; changed is one whose bits are not the same."""

    name: str
    rows: int
    rows_changed: int = 0
    masked: bool = False
    """Whether the mask says which of its rows may change."""
    rows_in_mask: int | None = None
    changed_inside: int | None = None
    changed_outside: int | None = None
    elements_changed_inside: int | None = None
    """Of `elements_changed` those in rows of the mask."""
    elements: int = 0
    elements_changed: int = 0
    change_norm: float = 0.0
    """L2 norm of the difference."""
    relative_change: float = 0.0
    """That, over the L2 norm of the tensor before."""
    share_of_change: float = 0.0
    """Its part of the squared norm of the whole model's difference."""


@dataclass(frozen=True)
class Audit:
    """Every tensor's change."""

    changes: list[Change]

    @property
    def changed_outside(self) -> int:
        """Rows outside the mask that changed, of all masked tensors."""
        return sum(change.changed_outside or 0 for change in self.changes)

    @property
    def changed_inside(self) -> int:
        """Rows inside the mask that changed."""
        return sum(change.changed_inside or 0 for change in self.changes)

    @property
    def elements_inside_and_outside(self) -> tuple[float, float]:
        """Share of the elements that changed, in the rows of the masks and in the masked tensors' other rows."""
        changed, of = [0, 0], [0, 0]
        for each in self.changes:
            if each.masked and each.rows and each.rows_in_mask is not None and each.elements_changed_inside is not None:
                inside = each.elements // each.rows * each.rows_in_mask
                of = [of[0] + inside, of[1] + each.elements - inside]
                changed[0] += each.elements_changed_inside
                changed[1] += each.elements_changed - each.elements_changed_inside
        return changed[0] / max(of[0], 1), changed[1] / max(of[1], 1)

    def json(self) -> str:
        """Everything, for programs."""
        total = {
            "rows": sum(change.rows for change in self.changes),
            "rows_changed": sum(change.rows_changed for change in self.changes),
            "changed_inside": self.changed_inside,
            "changed_outside": self.changed_outside,
            "elements": sum(change.elements for change in self.changes),
            "elements_changed": sum(change.elements_changed for change in self.changes),
            "change_norm": sqrt(sum(change.change_norm**2 for change in self.changes)),
        }
        return json.dumps({"tensors": {c.name: _without_name(c) for c in self.changes}, "total": total}, indent=2)

    def table(self) -> str:
        """Everything, for readers: one line a tensor, then the sum."""
        header = (
            "tensor",
            "rows",
            "changed",
            "in mask",
            "changed in",
            "changed out",
            "elements",
            "size",
            "relative",
            "share",
        )
        lines = [
            (
                c.name,
                str(c.rows),
                str(c.rows_changed),
                *("-" if n is None else str(n) for n in (c.rows_in_mask, c.changed_inside, c.changed_outside)),
                f"{c.elements_changed / max(c.elements, 1):.1%}",
                f"{c.change_norm:.2e}",
                f"{c.relative_change:.2e}",
                f"{c.share_of_change:.1%}",
            )
            for c in self.changes
        ]
        if not any(change.masked for change in self.changes):
            moved = sum(change.rows_changed > 0 for change in self.changes)
            said = f"{moved} of {len(lines)} tensors changed; no mask was given to hold them against"
            return f"{table(header, lines)}\n{said}"
        inside, outside = self.elements_inside_and_outside
        return (
            f"{table(header, lines)}\n"
            f"masked rows changed inside the mask: {self.changed_inside}, outside: {self.changed_outside}; "
            f"of their elements {inside:.2%} inside, {outside:.2%} outside"
        )


def _without_name(change: Change) -> dict[str, object]:
    return {name: value for name, value in asdict(change).items() if name != "name"}


def audit(before: Path, after: Path, *, mask: Path | None = None) -> Audit:
    """Compare two folders of the same model.

    mask: a file as `longact export-mask` writes it. Raises `ValueError` with a tensor's name if only one folder
    has it, if shape or dtype differ, or if the mask does not fit it.
    """
    old, new = HFFolder.open(before), HFFolder.open(after)
    aside = _left_aside(before)
    for name in [name for name in old.tensors.keys() - new.tensors.keys() if name.startswith(aside)]:
        del old.tensors[name]  # a conversion leaves it aside
    for name in sorted(old.tensors.keys() ^ new.tensors.keys()):
        there, lacks = (before, after) if name in old.tensors else (after, before)
        raise ValueError(f"{name} is in {there}, but not in {lacks}")
    masks = _read_masks(mask, old) if mask is not None else {}
    changes = [
        _compare(old.tensors[name], new.tensors[name], masks.get(name)) for name in sorted(old.tensors, key=_order)
    ]
    whole = sum(change.change_norm**2 for change in changes)
    for change in changes:
        change.share_of_change = change.change_norm**2 / whole if whole else 0.0
    return Audit(changes)


def _left_aside(folder: Path) -> tuple[str, ...]:
    """What names of tensors begin with that a conversion leaves aside; nothing of a model that is not converted."""
    try:
        return read_hf_config(folder).aside
    except ValueError:
        return ()


def _order(name: str) -> tuple[object, ...]:
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


def _read_masks(path: Path, folder: HFFolder) -> dict[str, Tensor]:
    """Masks by the name of the weight or bias whose rows they are about."""
    found: dict[str, Tensor] = {}
    for name, stored in read_header(path)[0].items():
        if stored.dtype != torch.bool:
            continue
        parts = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in folder.tensors]
        if not parts:
            raise ValueError(f"{path} has a mask {name}, but {folder.path} no {name}.weight")
        rows = folder.tensors[parts[0]].shape[0]
        if stored.shape != (rows,):
            raise ValueError(f"{path}: {name} has shape {list(stored.shape)}, {parts[0]} has {rows} rows")
        found |= dict.fromkeys(parts, stored.read())
    if not found:
        raise ValueError(f"{path} holds no mask: it has no bool tensor")
    return found


def _compare(old: StoredTensor, new: StoredTensor, mask: Tensor | None) -> Change:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise ValueError(
            f"{old.name} is {list(old.shape)} {old.dtype} in {old.path}, {list(new.shape)} {new.dtype} in {new.path}"
            + (
                "; the training's own precision (--bf16, --fp16) must be that of the folder"
                if old.shape == new.shape
                else ""
            )
        )
    rows = old.shape[0] if old.shape else 1
    changed, squares, before = [], 0.0, 0.0
    for a, b in _blocks(old, new):
        different = (_bits(a) != _bits(b)).view(len(a), -1)
        changed.append(different.sum(1))
        a64, b64 = a.double(), b.double()
        squares += float((b64 - a64).square().sum())
        before += float(a64.square().sum())
    by_row = torch.cat(changed) if changed else torch.zeros(rows, dtype=torch.int64)
    moved = by_row > 0
    change = Change(old.name, rows, int(moved.sum()), elements=max(old.nbytes // old.dtype.itemsize, 0))
    change.elements_changed = int(by_row.sum())
    change.change_norm = sqrt(squares)
    change.relative_change = sqrt(squares / before) if before else 0.0
    if mask is not None:
        change.masked, change.rows_in_mask = True, int(mask.sum())
        change.elements_changed_inside = int(by_row[mask].sum())
        change.changed_inside, change.changed_outside = int((moved & mask).sum()), int((moved & ~mask).sum())
    return change


def _blocks(old: StoredTensor, new: StoredTensor) -> Iterator[tuple[Tensor, Tensor]]:
    if not old.shape:
        yield old.read().view(1), new.read().view(1)
        return
    step = max(1, _BLOCK_BYTES // max(1, old.nbytes // max(1, old.shape[0])))
    for row in range(0, old.shape[0], step):
        yield old.read(slice(row, row + step)), new.read(slice(row, row + step))


_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_SAME_WIDTH[tensor.dtype.itemsize])
