"""A check, its result, and one table of all results of all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from megatron_longact.conversion.plan import table as aligned

Result = Literal["ok", "failed", "not here"]


class NotHereError(Exception):
    """Raised by a check whose object this machine does not have, a GPU for example; says what is missing."""


@dataclass(frozen=True)
class Measured:
    """A number with its unit, of which the table shows the lowest and the highest over ranks."""

    value: float
    unit: str


class TooLittleError(ValueError):
    """Raised by a check that measured less than was asked for."""

    def __init__(self, detail: str, measured: Measured) -> None:
        super().__init__(detail)
        self.measured = measured


@dataclass(frozen=True)
class Finding:
    """What a check found on a rank."""

    check: str
    result: Result
    detail: str
    measured: Measured | None = None


Check = Callable[[], str | tuple[str, Measured]]
"""Returns what it saw, with a number where there is one; raises for what is wrong or not here."""


def examine(name: str, check: Check, *, required: bool = False) -> Finding:
    """Run a check. required: what is not here has failed."""
    try:
        seen = check()
    except NotHereError as missing:
        return Finding(name, "failed" if required else "not here", str(missing))
    except TooLittleError as error:
        return Finding(name, "failed", str(error), error.measured)
    except Exception as error:  # whatever breaks a check, the machine did not pass it
        words = " ".join(str(error).split())
        return Finding(name, "failed", words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}")
    detail, measured = (seen, None) if isinstance(seen, str) else seen
    return Finding(name, "ok", detail, measured)


def table(findings: Sequence[Sequence[Finding]]) -> str:
    """One line for each check and each different finding, with the ranks that made it; findings[i] are rank i's."""
    names = list(dict.fromkeys(finding.check for own in findings for finding in own))
    lines = [line for name in names for line in _lines(name, findings)]
    rows = aligned(("check", "ranks", "result"), [line[:3] for line in lines]).split("\n")
    return "\n".join([f"{rows[0]}  what", *(f"{row}  {line[3]}" for row, line in zip(rows[1:], lines, strict=True))])


def failures(findings: Sequence[Sequence[Finding]], *, nodes: Sequence[str]) -> list[str]:
    """One line for each check that failed somewhere: where, and what was found. nodes: of the ranks."""
    lines = []
    names = dict.fromkeys(finding.check for own in findings for finding in own)
    for name in names:
        for detail, ranks in _ranks_by_detail(name, "failed", findings).items():
            on = ", ".join(sorted({nodes[rank] for rank in ranks}))
            lines.append(f"{name} failed on rank {_spans(ranks)} ({on}): {detail}{_range(name, ranks, findings)}")
    return lines


def _ranks_by_detail(name: str, result: Result, findings: Sequence[Sequence[Finding]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, own in enumerate(findings):
        for finding in own:
            if (finding.check, finding.result) == (name, result):
                found.setdefault(finding.detail, []).append(rank)
    return found


def _lines(name: str, findings: Sequence[Sequence[Finding]]) -> list[tuple[str, str, str, str]]:
    lines = []
    for result in ("ok", "failed", "not here"):
        for detail, ranks in _ranks_by_detail(name, result, findings).items():
            lines.append((name, _spans(ranks), result, detail + _range(name, ranks, findings)))
    return lines


def _range(name: str, ranks: Sequence[int], findings: Sequence[Sequence[Finding]]) -> str:
    """Lowest and highest of what these ranks measured, to be appended."""
    measured = [(f.measured, rank) for rank in ranks for f in findings[rank] if f.check == name and f.measured]
    if not measured:
        return ""
    values, unit = [(number.value, rank) for number, rank in measured], measured[0][0].unit
    (low, slowest), (high, _) = min(values), max(values)
    if f"{low:.3g}" == f"{high:.3g}":
        return f", {low:.3g} {unit}"
    return f", {low:.3g} (rank {slowest}) to {high:.3g} {unit}"


def _spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as `0-2,5`."""
    groups = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in groups)
