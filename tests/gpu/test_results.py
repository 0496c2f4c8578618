"""The page of the GPU tier, written by real sessions of pytest, and what the tier says without a GPU."""

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.launch import ROOT
from tests.ranks import run_program

PYTEST = str(Path(pytest.__file__).with_name("__main__.py"))

CONFTEST = """
from pathlib import Path
from tests.gpu.results import ResultsPage, machine

def pytest_configure(config):
    config.pluginmanager.register(ResultsPage(Path(__file__).with_name("page.md"), machine=machine()))
"""

TESTS = """
import pytest

pytestmark = pytest.mark.gpu

def test_measured(record_property):
    record_property("share", 0.123456)
    record_property("kernel", "a|b")

def test_wrong():
    assert 1 == 2, "not | so"

@pytest.mark.skip(reason="NOT RUN: no such chip")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise RuntimeError("no machine")

def test_of_a_broken_fixture(broken):
    pass
"""


def run_pytest(*arguments: str) -> tuple[int, str]:
    done = run_program(PYTEST, "-p", "no:cacheprovider", *arguments, launcher=False, cpu=False)
    return done.returncode, done.stdout + done.stderr


def test_the_page_says_what_each_test_measured(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    run_pytest("-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path))
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines[2] == "1 passed, 2 failed, 1 skipped. Written by `make test-gpu`."
    assert f"| torch | {version('torch')} |" in lines
    assert any(line.startswith("| megatron-core | 0.19") for line in lines)
    rows = [
        "| test_some test_measured | passed | share: 0.1235; kernel: a\\|b |",
        "| test_some test_of_a_broken_fixture | failed | RuntimeError: no machine |",
        "| test_some test_skipped | skipped | NOT RUN: no such chip |",
        "| test_some test_wrong | failed | AssertionError: not \\| so |",
    ]
    assert lines[-4:] == rows
    (tmp_path / "test_some.py").write_text(TESTS.replace("1 == 2", "1 == 1"))
    run_pytest("-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path), "-k", "wrong")
    again = (tmp_path / "page.md").read_text().splitlines()
    assert again[2] == "2 passed, 1 failed, 1 skipped. Written by `make test-gpu`."
    assert again[-4:] == [*rows[:3], "| test_some test_wrong | passed |  |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_tier_says_so_and_leaves_the_page_alone() -> None:
    page = ROOT / "docs/gpu-results.md"
    before = page.read_bytes()
    code, output = run_pytest("-m", "gpu", "tests/gpu")
    assert code == 0
    assert "the GPU tier was NOT RUN" in output
    assert "on a machine with one: make test-gpu" in output
    assert page.read_bytes() == before
