"""What a conversion would do, from config.json alone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_longact.conversion.hf_config import read_hf_config
from megatron_longact.conversion.mapping import Entry, entries_of, padded_vocab_size
from megatron_longact.conversion.megatron_args import model_flags


def plan(hf_dir: Path) -> str:
    """Every tensor on both sides, with shapes and sizes, and Megatron's flags; no weights are looked at.

    Raises `ValueError` as `read_hf_config` does. Sizes are those of config.json's dtype, bfloat16 where it names none.
    """
    model = read_hf_config(hf_dir)
    entries, dtype = entries_of(model), model.dtype or torch.bfloat16
    padded = padded_vocab_size(model)
    lines = [line for entry in entries for line in _lines(entry, dtype, padded)]
    numel = sum(entry.numel for entry in entries)
    largest = max(entries, key=lambda entry: entry.numel)
    count = sum(len(entry.hf) for entry in entries)
    size, name = _size(numel * dtype.itemsize), str(dtype).removeprefix("torch.")
    return "\n".join(
        [
            f"{model.model_type}: {model.num_layers} layers, {numel:,} parameters, {size} in {name}",
            *lines,
            f"total: {count} Hugging Face tensors, {len({entry.stored.key for entry in entries})} Megatron tensors, "
            f"{numel:,} parameters, {size}",
            f"largest: {largest.hf[0].name}, {_size(largest.numel * dtype.itemsize)}",
            f"vocabulary: {model.vocab_size} rows, {padded} in Megatron",
            f"Megatron arguments: {' '.join(model_flags(model))}",
        ]
    )


def _lines(entry: Entry, dtype: torch.dtype, padded: int) -> list[str]:
    """One line a Hugging Face tensor: its name, shape and size, and where it goes."""
    entry = entry.stored
    rows = padded if entry.layout == "vocab" else entry.rows
    shape = [*entry.leading, rows, *entry.shape[1:]]
    place = "".join(f"[{number}]" for number in entry.index)
    lines, row = [], 0
    for tensor in entry.hf:
        if entry.layout == "qkv":
            where = f"{place}, by query group"
        else:
            where = f"{place}, rows {row}:{row + tensor.shape[0]}" if len(entry.hf) > 1 else place
        row += tensor.shape[0]
        size = _size(tensor.numel * dtype.itemsize)
        lines.append(f"{tensor.name} {list(tensor.shape)} {size} -> {entry.key}{where} of {shape}")
    return lines


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
