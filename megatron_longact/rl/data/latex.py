r"""Answers as models write them: the last `\boxed{}` of a response, and what number a piece of LaTeX is.

Read are fractions, mixed numbers, powers, thousands separators, texts, units and percent signs. Anything else that
has a value of its own (`\sqrt{2}`, `\pi`) becomes `UNREADABLE`, so that no number next to it is taken for the answer.
"""

from __future__ import annotations

import math
import re

UNREADABLE = "\N{REPLACEMENT CHARACTER}"

NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?",
)
"""A number in prose, with or without thousands separators."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"\$?(?=[-+(]*(?:\.?\d|[A-Z]\b|\\[A-Za-z]))[^\s$]+")
r"""What `\boxed` boxes without braces: a number, a letter or a command, up to white space."""

_FRACTIONS = {rf"\{name}" for name in ("frac", "dfrac", "tfrac", "cfrac", "sfrac", "nicefrac")}
_TEXTS = {
    rf"\{name}"
    for name in (
        *("text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "mbox", "emph", "underline"),
        *("mathrm", "mathbf", "mathit", "mathsf", "mathtt", "mathnormal", "operatorname", "boldsymbol", "bm"),
        *("boxed", "fbox", "ensuremath"),
    )
}
"""What says only how its argument looks."""

_SPACES = {
    rf"\{name}"
    for name in (
        *("quad", "qquad", "displaystyle", "textstyle", "approx", "sim", "simeq", "equiv", "le", "leq", "ge", "geq"),
        *("to", "rightarrow", "Rightarrow", "implies", "therefore", "Omega", "mu", "ell", "AA", "euro", "pounds"),
        *("(", ")", "[", "]", "\\"),
    )
}
_NOTHING = {
    rf"\{name}"
    for name in (
        *("left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "!", "circ", "degree"),
        *("prime", "limits", "hfill", "noindent"),
    )
}
_CHARACTERS = {rf"\{c}": c for c in "%$#&_{}"} | {r"\cdot": "×", r"\times": "×"}
_THIN = "\N{THIN SPACE}"
_CHARACTERS |= {rf"\{c}": _THIN for c in ",;:> "} | {"~": _THIN, "$": " ", "}": ""}

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_~$]|[^\\{}^_~$]+|\\", re.DOTALL)
_DEEPEST = 40
"""Nested groups that are read; what lies deeper is unreadable."""

_N = r"\d+(?:\.\d+)?"
_GROUPED = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:[ {_THIN}]\d{{3}})+(?!\d)")
_SCIENTIFIC = re.compile(rf"(?<![\d.])({_N})\s*×\s*1e([-+]?\d+)")
_RATIO = re.compile(rf"(?<![\w./])([-+]?)(?:(\d+)\s+)?({_N})\s*/\s*({_N})(?![\w./]*/)(?!\d)")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}`, `\fbox{}` or `\boxed 5` that is not empty, as plain text.

    Empty if its brace is never closed; None if there is no box.
    """
    reader = _Reader(text)
    for found in reversed(list(_BOX.finditer(text))):
        inside = reader.inside(found.end())
        if inside is None:
            return ""
        if content := reader.plain(*inside).strip():
            return content
    return None


def numbers_of(plain: str) -> list[float]:
    """The numbers of a box or a reference, as `last_boxed` or `plain_text` give it; none if a part is unreadable."""
    if UNREADABLE in plain:
        return []
    plain = _GROUPED.sub(lambda found: re.sub(r"\s", "", found[0]), plain)
    plain = _RATIO.sub(_ratio_found, _SCIENTIFIC.sub(r"\1e\2", plain))
    return numbers_in_prose(plain)


def numbers_in_prose(text: str) -> list[float]:
    """All numbers of a text, as they stand there."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))]


def plain_text(latex: str) -> str:
    """LaTeX as plain text, numbers written out."""
    return _Reader(latex).plain(0, len(latex))


def with_fractions(text: str) -> str:
    """Prose with its LaTeX fractions as numbers, and all else as it stands."""
    reader, out, at = _Reader(text), [""], 0
    for found in re.finditer(r"\\[a-z]+", text):
        if found[0] in _FRACTIONS and found.start() >= at:
            out.append(text[at : found.start()])
            at = reader.add_fraction(out, found.end(), len(text), depth=0)
    return "".join(out) + text[at:]


class _Reader:
    """A text whose braces are matched once, so that reading takes a time that grows with its length alone."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._closing: dict[int, int] = {}
        opened: list[int] = []
        for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
            if found[0] == "{":
                opened.append(found.start())
            elif found[0] == "}" and opened:
                self._closing[opened.pop()] = found.start()

    def inside(self, at: int) -> tuple[int, int] | None:
        """Begin and end of what a box that is opened before `at` holds; None if it is not closed."""
        if self._text[at : at + 1] == "{":
            end = self._closing.get(at)
            return None if end is None else (at + 1, end)
        unbraced = _UNBRACED.match(self._text, at)
        return unbraced.span() if unbraced else (at, at)

    def plain(self, start: int, end: int, *, depth: int = 0) -> str:
        """A range as plain text."""
        if depth > _DEEPEST:
            return UNREADABLE
        out = [""]
        while start < end:
            found = _TOKEN.match(self._text, start)
            assert found is not None
            start = self._add(out, found[0], found.end(), end, depth=depth)
        return "".join(out)

    def add_fraction(self, out: list[str], at: int, end: int, *, depth: int) -> int:
        """Append the fraction whose arguments begin at `at`; a whole number directly before it belongs to it."""
        above, at = self._argument(at, end, depth=depth)
        below, at = self._argument(at, end, depth=depth)
        value = _ratio(_single(above), _single(below))
        before = out[-1].rstrip()
        if before.endswith("-") and value is not None and value < 0:
            out[-1], value = before[:-1], -value
        mixed = re.search(r"(?<![\w.,^])\d+$", before[-12:])
        if mixed and value is not None:
            out[-1], value = before[: len(before) - len(mixed[0])], int(mixed[0]) + value
        elif before[-1:].isdigit():  # a product
            value = None
        out.append(UNREADABLE if value is None else repr(value))
        return at

    def _add(self, out: list[str], token: str, at: int, end: int, *, depth: int) -> int:
        """Append what a token stands for, with its arguments; where to go on."""
        if token in _FRACTIONS:
            return self.add_fraction(out, at, end, depth=depth)
        if token == "{":
            return self._add_group(out, at, depth=depth)
        if token in _TEXTS or token in ("^", "_"):
            argument, at = self._argument(at, end, depth=depth)
            if token != "_":  # what stands below is a name's, or a base
                out.append(_power(out, argument) if token == "^" else argument)
        elif token[0] == "\\" and token not in _CHARACTERS:
            out.append("" if token in _NOTHING else " " if token in _SPACES else UNREADABLE)
        else:
            out.append(_CHARACTERS.get(token, token))
        return at

    def _add_group(self, out: list[str], at: int, *, depth: int) -> int:
        """`{,}` separates thousands before exactly three digits, and is a decimal comma elsewhere."""
        close = self._closing.get(at - 1)
        if close is None:
            return at
        if self._text[at:close] == ",":
            out.append("," if re.match(r"\d{3}(?!\d)", self._text[close + 1 : close + 5]) else ".")
        else:
            out.append(self.plain(at, close, depth=depth + 1))
        return close + 1

    def _argument(self, at: int, end: int, *, depth: int) -> tuple[str, int]:
        """A command's argument as plain text, a group or one character or command; and what comes behind it."""
        while at < end and self._text[at].isspace():
            at += 1
        if at >= end:
            return UNREADABLE, at
        if self._text[at] == "{":
            close = self._closing.get(at)
            return (UNREADABLE, end) if close is None else (self.plain(at + 1, close, depth=depth + 1), close + 1)
        if self._text[at] != "\\":
            return self._text[at], at + 1
        found = _TOKEN.match(self._text, at)
        assert found is not None
        out = [""]
        at = self._add(out, found[0], found.end(), end, depth=depth + 1) if depth <= _DEEPEST else end
        return "".join(out), at


def _power(out: list[str], exponent: str) -> str:
    """What to append for an exponent; the number before it, which it belongs to, is taken off `out`."""
    base = re.search(r"(?<![\w.])\d+(?:\.\d+)?$", out[-1][-20:])
    if base is None:  # of a unit, or of what is no number
        return UNREADABLE if out[-1].rstrip().endswith((")", "]")) else ""
    if not exponent.strip():  # degrees
        return ""
    number = _single(exponent)
    if number is None or number != int(number) or abs(number) > 400:
        return UNREADABLE
    out[-1] = out[-1][: len(out[-1]) - len(base[0])]
    if base[0] == "10":
        return f"1e{int(number)}"
    try:
        return repr(float(base[0]) ** int(number))
    except (OverflowError, ZeroDivisionError):
        return UNREADABLE


def _single(plain: str) -> float | None:
    """The number that a text is, with units or a sign; None unless it is exactly one."""
    numbers = numbers_of(plain)
    return numbers[0] if len(numbers) == 1 and math.isfinite(numbers[0]) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _ratio_found(found: re.Match[str]) -> str:
    sign, whole, above, below = found.groups()
    value = _ratio(float(above), float(below))
    return UNREADABLE if value is None else f"{sign}{float(whole or 0) + value!r}"
