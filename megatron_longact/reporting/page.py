"""One self-contained HTML page: tables, charts, pictures and text, nothing from outside. The template is page.html.

Everything that is said is escaped; only `Markup`, which `charts` makes, is taken as it is.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MOST_BYTES = 2_000_000
"""Of a page; pictures that would make it larger are left out, and named."""
_TEXT_BYTES = 500_000
"""Of them, for what is no picture."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row. folded: shown when asked for."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Chart:
    """What is inside an `<svg>`; alt: what it shows, in words; labels: of its curves, in the order of their colours."""

    title: str
    svg: Markup
    alt: str
    labels: Sequence[str]
    kind: str = "chart"


@dataclass(frozen=True)
class Picture:
    """A PNG."""

    title: str
    png: bytes
    alt: str
    kind: str = "picture"

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Answer:
    """Something the model said; facts: a line on it; parts: headings and what stands below them, letter by letter."""

    title: str
    facts: str
    parts: Sequence[tuple[str, str]]
    kind: str = "answer"


Part = Text | Table | Chart | Picture | Answer


@dataclass(frozen=True)
class Section:
    """Parts under a heading; charts that follow each other stand side by side where there is room."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A page; lead: what it comes to, a sentence each; facts: the most important numbers, each with its name."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = field(default=())


def render(page: Page) -> str:
    """The HTML; pictures beyond `MOST_BYTES` are replaced by a sentence."""
    loader = PackageLoader("megatron_longact.reporting", package_path="")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    left, sections = MOST_BYTES - _TEXT_BYTES, []
    for section in page.sections:
        parts: list[Part] = []
        for part in section.parts:
            size = len(part.uri) if isinstance(part, Picture) else 0
            if isinstance(part, Picture) and size > left:
                part = Text(f"{part.title}: left out, for it would make this page too large.")
            else:
                left -= size
            parts.append(part)
        if parts:
            sections.append(Section(section.title, parts))
    return environment.get_template("page.html").render(page=page, sections=sections)


def write(page: Page, path: Path) -> None:
    """Write it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page), encoding="utf-8", errors="backslashreplace")
