"""What holds for the whole run: the order of files, the cores of a worker, `--times`, and the end of the ranks."""

import gc
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from tests import ranks

settings.register_profile("any machine", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("any machine")

LONGEST = [
    "test_layouts",
    "test_checkpoints",
    "test_run",
    "test_train_grpo",
    "test_versions",
    "test_mla",
    "test_longact",
    "test_quickstart",
    "test_slurm",
    "test_disrupt",
    "test_stability",
    "test_cpu",
    "test_rl_objective",
    "test_observe",
    "test_dynamic_rollout",
    "test_preflight",
    "test_plan",
    "test_conversion",
    "test_conversion_logits",
    "test_evaluate",
    "test_apex",
    "test_docs",
    "test_rollout",
    "test_megatron_lm",
    "test_moments",
    "test_integrations",
    "test_export_mask",
    "test_ruler",
    "test_refusals",
]
"""Files that take long. Each runs on one worker: they come first, so that no worker is left alone with one."""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tiny Qwen3, as transformers saves it."""
    from tests.conversion import make_hf

    make_hf("qwen3", tmp_path / "hf")
    return tmp_path / "hf"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", action="store_true", help="print the time by file, and the ten slowest tests")


def pytest_configure(config: pytest.Config) -> None:
    """Each worker keeps to cores of its own, with all that it starts: waking a rank on the same core costs less."""
    worker, cores = getattr(config, "workerinput", None), sorted(os.sched_getaffinity(0))
    if worker is not None and worker["workercount"] <= len(cores):
        os.sched_setaffinity(0, cores[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # half a million objects of what was imported, through which each full collection would go


def pytest_sessionfinish() -> None:
    """End the ranks: a pytest-xdist worker ends without the atexit handlers that would."""
    ranks.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--times"):
        return
    by_test: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                by_test[report.nodeid] += report.duration
    by_file: Counter[str] = Counter()
    for test, seconds in by_test.items():
        by_file[test.split("::")[0]] += seconds
    for title, times in (("file", by_file.most_common()), ("test", by_test.most_common(10))):
        lines = [f"| {title} | seconds |", "|---|---|", *(f"| `{name}` | {s:.1f} |" for name, s in times if s >= 0.5)]
        terminalreporter.write_line("\n" + "\n".join(lines))
