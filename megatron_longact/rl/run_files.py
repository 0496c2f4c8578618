"""What a run has left in its folder so far, read back: for `longact report`. Needs no Megatron but for checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from megatron_longact.conversion.torch_dist import TRACKER, iteration_folder, read_common_state
from megatron_longact.reporting.run_log import EVALUATIONS, HELDOUT, MEGATRON_LOG, METRICS, ROLLOUTS, rows_of
from megatron_longact.rl.report import REPORT

VERSIONS = "versions.json"
_PACKAGES = ("megatron-longact", "megatron-core", "torch", "transformer-engine", "transformers")
_FINISHED = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)
_ARGUMENT = re.compile(r"^  (\w+) \.+ (.*)$")


def write_versions(run_dir: Path) -> None:
    """Say what a run is made with."""
    found = {"python": python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    (run_dir / VERSIONS).write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is not there is empty. checkpoints: where it saves, if not in its folder."""

    folder: Path
    checkpoints: Path | None = field(default=None)

    @property
    def is_run(self) -> bool:
        """Whether a run has been here."""
        return (self.folder / METRICS).is_file()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return self._rows(METRICS)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of evaluations.jsonl."""
        return self._rows(EVALUATIONS)

    def answers(self, *, heldout: bool) -> list[dict[str, Any]]:
        """Those of the last evaluation, or of the last rollout step."""
        rows = self._rows(HELDOUT if heldout else ROLLOUTS)
        return [row for row in rows if row["iteration"] == rows[-1]["iteration"]]

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """Whole lines: the last one of a run that is going may not be there yet in full."""
        path = self.folder / name
        return list(rows_of(path)) if path.is_file() else []

    @cached_property
    def report(self) -> str:
        """report.md, of a run that has ended."""
        path = self.folder / REPORT
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def verdict(self) -> str:
        """What report.md says first; nothing of one that was cut off before."""
        return next(iter(self.report.split("\n\n")[1:2]), "")

    def table(self, name: str) -> list[tuple[str, str]]:
        """Rows of report.md's table of that first column."""
        _, found, rest = self.report.partition(f"| {name} |")
        rows = _FINISHED.findall(rest.partition("\n\n")[0]) if found else []
        return [(key, value.strip("`").replace("\\|", "|")) for key, value in rows if set(key) != {"-"}]

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Megatron's arguments as it printed them at the last start; a log's beginning is enough."""
        path = self.folder / MEGATRON_LOG
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8", errors="replace") as file:
            return dict(_arguments(file))

    @cached_property
    def versions(self) -> dict[str, str]:
        """Packages that the run is made with; none out of a file that was cut off."""
        path = self.folder / VERSIONS
        try:
            return dict(json.loads(path.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    @cached_property
    def checkpoint(self) -> tuple[str, dict[str, Any]] | None:
        """Name and common state of the newest checkpoint; `ValueError` if the folder that was given has none."""
        if self.checkpoints is not None and not (self.checkpoints / TRACKER).is_file():
            raise ValueError(f"--load {self.checkpoints} holds no checkpoint: {TRACKER} is not there")
        places = [self.checkpoints or self.folder / "checkpoints"]
        places += [Path(self.arguments["save"])] if self.arguments.get("save") else []
        for place in places:
            if (place / TRACKER).is_file():
                folder = iteration_folder(place)
                return folder.name, read_common_state(folder)
        return None

    def state(self, name: str) -> dict[str, Any] | None:
        """What the newest checkpoint holds of "longact" or "rl"."""
        found = self.checkpoint
        state: dict[str, Any] | None = ((found[1].get("opt_param_scheduler") or {}) if found else {}).get(name)
        return state


def _arguments(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if match := _ARGUMENT.match(line):
            yield match[1], match[2].strip()


def runs_below(folder: Path) -> list[Path]:
    """Folders of runs, by name: those of an ablation lie three deep, objective, arm and seed."""
    found: Sequence[Path] = sorted(path.parent for depth in range(1, 5) for path in folder.glob("*/" * depth + METRICS))
    return list(found)
