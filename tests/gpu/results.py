"""docs/gpu-results.md: what the GPU tier said, on what and when; tests give it values with `record_property`."""

import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

COMMAND = "make test-gpu"
PACKAGES = ("torch", "transformer-engine", "megatron-core", "flash-attn", "triton")
ORDER = {"skipped": 0, "passed": 1, "failed": 2}


class ResultsPage:
    """Collects the reports of the tests marked `gpu` and writes them to `path` at the end of a session.

    Results of other tests stay on the page if the same machine wrote them: the tier may be run in parts.
    """

    def __init__(self, path: Path, *, machine: dict[str, str]) -> None:
        self.path, self.machine = path, machine
        self._outcomes: dict[str, str] = {}
        self._remarks: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of setup, call and teardown, and what the test recorded."""
        if "gpu" not in report.keywords:
            return
        outcome = "failed" if report.failed else "skipped" if report.skipped else "passed"
        if report.when == "call" or outcome != "passed":
            known = self._outcomes.get(report.nodeid, outcome)
            self._outcomes[report.nodeid] = max(known, outcome, key=ORDER.__getitem__)
        remarks = self._remarks.setdefault(report.nodeid, [])
        if report.when == "call":
            remarks += [f"{name}: {_shown(value)}" for name, value in report.user_properties]
        if report.skipped:
            remarks.append(_reason(report))
        if report.failed:
            remarks.append(_last_line(report))

    def pytest_sessionfinish(self) -> None:
        """Write the page, if a test was run at all."""
        if set(self._outcomes.values()) - {"skipped"}:
            self.path.write_text("\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterable[str]:
        rows = self._known_rows() | dict(map(self._row, self._outcomes))
        outcomes = [row.split(" | ")[1] for row in rows.values()]
        counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))
        yield from ("# GPU results", "", f"{counts}. Written by `{COMMAND}`.", "", "| | |", "|---|---|")
        yield from self._machine_rows()
        yield from ("", "| test | outcome | measured, or why not |", "|---|---|---|")
        yield from (row for _, row in sorted(rows.items()))  # ranks of pytest-xdist end in any order

    def _machine_rows(self) -> list[str]:
        return [f"| {name} | {_cell(value)} |" for name, value in self.machine.items()]

    def _known_rows(self) -> dict[str, str]:
        """What the page says now, by test, if it is of this machine."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        same = set(self._machine_rows()[1:]) <= set(lines)  # the date, which is first, may differ
        return {line.split(" | ")[0]: line for line in lines if same and line.startswith("| test_")}

    def _row(self, test: str) -> tuple[str, str]:
        name = f"| {_cell(test.rpartition('/')[2].replace('.py::', ' '))}"
        return name, f"{name} | {self._outcomes[test]} | {_cell('; '.join(self._remarks[test]))} |"


def machine() -> dict[str, str]:
    """What the numbers were measured on: device, date, versions."""
    import torch

    known = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known["device"] = f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        known["driver"] = _driver()
        known["CUDA"] = str(torch.version.cuda)
    else:
        known["device"] = "no GPU"
    known["Python"] = platform.python_version()
    return known | {package: found for package in PACKAGES if (found := _version(package))}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"


def _last_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().split("\n")[0][:200]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
