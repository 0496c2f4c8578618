"""`--html` of the analysis tools: their tables, words and pictures as one page that can be sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_longact.reporting.page import Answer, Part, Picture, Section, Table, Text


def section(
    title: str, folder: Path, *, words: str, tables: Mapping[str, str], pictures: Mapping[str, str], legend: str = ""
) -> Section:
    """What a tool said and left in a folder.

    tables: as they are printed, by caption; pictures: what they show, by file name; those that are not there are left
    out, and a tool without matplotlib leaves none.
    """
    parts: list[Part] = [Text(line) for line in words.split("\n") if line.strip()]
    parts += [text_table(caption, text) for caption, text in tables.items()]
    parts += [Text(legend)] if legend else []
    there = {name: alt for name, alt in pictures.items() if (folder / name).is_file()}
    parts += [Picture(name.removesuffix(".png"), (folder / name).read_bytes(), alt) for name, alt in there.items()]
    return Section(title, parts)


def text_table(caption: str, text: str) -> Table | Answer:
    """A printed table: columns are two blanks or more apart; as it was printed where a cell is empty."""
    header, *rows = (re.split(r"\s{2,}", line.strip()) for line in text.strip().split("\n"))
    if any(len(row) != len(header) for row in rows):
        return Answer(caption, "", [("", text)])
    return Table(caption, header, rows)
