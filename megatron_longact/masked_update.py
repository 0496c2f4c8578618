"""The masked update: frozen rows get no gradient, and strict freeze puts their bits back after the step.

Shape letters: r rows of a parameter of this rank, w its row width (h for a weight, 1 for a bias). A *shard*
is the flat slice [start, end) of a parameter that this rank's optimizer owns; it can begin and end inside a
row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_longact.config import LongActConfig


class RowIndex:
    """Ascending indices of the frozen rows of one parameter: on its device, and on the host for cutting.

    Masters need not lie on the parameter's device: those of a CPU-offloaded optimizer are on the host.
    """

    def __init__(self, rows: Tensor, device: torch.device, *, copy: Tensor | None = None) -> None:
        """rows: int64 on the host, ascending; device: that of the parameter; copy: if there is one there already."""
        self.host = rows
        self.device = rows.to(device, non_blocking=True) if copy is None else copy
        self._sorted = np.array(rows.tolist(), np.int64) if copy is None else rows.numpy()
        self._on = {rows.device: self.host, self.device.device: self.device}

    def __len__(self) -> int:
        return self.host.numel()

    def on(self, device: torch.device) -> Tensor:
        """All of them on a device: int64; copied there once."""
        if device not in self._on:
            self._on[device] = self.host.to(device, non_blocking=True)
        return self._on[device]

    def within(self, first: int, num_rows: int, device: torch.device) -> Tensor:
        """Those in [first, first + num_rows), counted from `first`; int64 on the device of what they cut. Read only."""
        low, high = self._sorted.searchsorted((first, first + num_rows))
        rows = self.on(device)[low:high]
        return rows - first if first else rows


FrozenRows = Mapping[nn.Parameter, RowIndex]


def row_views(flat: Tensor, start: int, row_width: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a shard at row boundaries: pairs of a view [n, w] and the row of the parameter it begins in.

    flat: [end - start], the shard. At most three views: the end of a row, whole rows, the beginning of a
    row. Empty ones are left out.
    """
    head = min(-start % row_width, flat.numel())
    body = head + (flat.numel() - head) // row_width * row_width
    for begin, end, num_rows in ((0, head, 1), (head, body, -1), (body, flat.numel(), 1)):
        if end > begin:
            shape = (num_rows, row_width) if num_rows < 0 else (1, end - begin)
            yield flat[begin:end].view(shape), (start + begin) // row_width


def frozen_parts(flat: Tensor, start: int, row_width: int, frozen: RowIndex) -> Iterator[tuple[Tensor, Tensor]]:
    """The frozen elements of a shard: pairs of a view [n, w] and the int64 rows of it that are frozen, beside it."""
    for view, first in row_views(flat, start, row_width):
        rows = frozen.within(first, view.shape[0], view.device)
        if rows.numel():
            yield view, rows


def mask_gradients(frozen: FrozenRows) -> None:
    """Zero the frozen rows of every `main_grad`: one indexed write a parameter."""
    for parameter, rows in frozen.items():
        if len(rows):
            gradient = gradient_of(parameter)
            gradient.index_fill_(0, rows.on(gradient.device), 0)


def gradient_squares(shards: Sequence["Shard"], row_sets: Sequence[FrozenRows], device: torch.device) -> Tensor:
    """Squared gradient norm of each set of rows, over this rank's shards: fp32 [number of sets].

    Each gradient is read once, by one kernel a view. device: of the gradients.
    """
    norms: list[Tensor] = []
    places: list[list[Tensor]] = [[] for _ in row_sets]
    seen = 0
    for shard in shards:
        flat = gradient_of(shard.parameter).view(-1)[shard.start : shard.end]
        for view, first in row_views(flat, shard.start, shard.row_width):
            norms.append(torch.linalg.vector_norm(view, dim=1, dtype=torch.float32))
            for found, rows in zip(places, row_sets, strict=True):
                found.append(rows[shard.parameter].within(first, view.shape[0], view.device) + seen)
            seen += view.shape[0]
    if not norms:
        return torch.zeros(len(row_sets), dtype=torch.float32, device=device)
    squares = torch.cat(norms).square()
    return torch.stack([squares[torch.cat(found)].sum() for found in places])


def add_gradient_rows(sums: Tensor, shard: "Shard") -> None:
    """Add what this rank owns of a gradient to its rows: to sums[0] the squares, to sums[1] how many; fp32 [2, r].

    Over all ranks each element is then as often in the one as in the other, however many own it.
    """
    flat = gradient_of(shard.parameter).view(-1)[shard.start : shard.end]
    for view, first in row_views(flat, shard.start, shard.row_width):
        rows = sums[:, first : first + len(view)]
        rows[0] += view.float().square().sum(1)
        rows[1] += view.shape[1]


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Megatron's gradient of a parameter: `main_grad`, a view of the DDP gradient buffer."""
    gradient = getattr(parameter, "main_grad", None)
    assert gradient is not None, "LongAct.attach checked that Megatron's DistributedDataParallel holds the gradients"
    return gradient


@dataclass(frozen=True)
class Shard:
    """The slice of one parameter that this rank owns in one Megatron optimizer."""

    parameter: nn.Parameter
    start: int
    end: int
    masters: Callable[[], list[Tensor]]
    """The tensors that hold the master values, each with end - start elements; asked anew at each step."""

    inner_parameter: Tensor
    """The key of its state in the inner optimizer."""

    @property
    def row_width(self) -> int:
        """Elements of one row of the parameter."""
        return self.parameter.numel() // self.parameter.shape[0]

    def parts(self, flat: Tensor, frozen: FrozenRows) -> list[tuple[Tensor, Tensor]]:
        """`frozen_parts` of a tensor that is laid out as this shard."""
        assert flat.numel() == self.end - self.start
        return list(frozen_parts(flat.detach().view(-1), self.start, self.row_width, frozen[self.parameter]))


def is_offloaded(inner: Any) -> bool:
    """Whether an inner optimizer is Megatron's `HybridDeviceOptimizer` (`--optimizer-cpu-offload`)."""
    return type(inner).__name__ == "HybridDeviceOptimizer"


class StrictFreeze:
    """Keeps frozen elements of the master parameters bit-identical around one inner optimizer's step."""

    def __init__(self, shards: Sequence[Shard], inner: torch.optim.Optimizer, config: LongActConfig) -> None:
        self.shards, self.inner, self._config = shards, inner, config
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def before_step(self, frozen: FrozenRows) -> None:
        """Save the frozen part of the masters, and of the moments when they are held."""
        self._saved.clear()  # of a step that an exception ended
        for shard in self.shards:
            if not len(frozen[shard.parameter]):
                continue
            if self._config.freeze == "strict":
                for master in shard.masters():
                    self._save(shard.parts(master, frozen))
            if self._config.moments == "hold":
                for moment in self._moments(shard):
                    self._save(shard.parts(moment, frozen))

    def after_step(self, frozen: FrozenRows) -> None:
        """Put them back; with moments "reset", zero the moments of frozen elements."""
        if self._saved and is_offloaded(self.inner):
            torch.cuda.synchronize()  # its sub-optimizers copy masters back on a stream of their own
        for view, rows, values in self._saved:
            view.index_copy_(0, rows, values)
        self._saved.clear()
        if self._config.moments == "reset":
            for shard in self.shards:
                for moment in self._moments(shard):
                    for view, rows in shard.parts(moment, frozen):
                        view.index_fill_(0, rows, 0)

    def _save(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self._saved += [(view, rows, view.index_select(0, rows)) for view, rows in parts]

    def _moments(self, shard: Shard) -> list[Tensor]:
        """State tensors that have an element for each of the shard's; none before the first step."""
        state = self.inner.state.get(shard.inner_parameter, {})
        return [
            value
            for name, value in state.items()
            if name not in ("master_param", "step")
            and isinstance(value, Tensor)
            and value.numel() == shard.end - shard.start
        ]
