"""Other Megatrons than the pinned one: the rules, and a few of the library's tests and the launcher on each of them."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_longact.__main__ import main
from megatron_longact.versions import NEWEST_TESTED, OLDEST, check_programs, check_version, installed, version_of
from tests.launch import run as run_command
from tests.ranks import run_program

ROOT = Path(__file__).parent.parent
OTHERS = ["0.16.1", "0.17.1", "0.18.2"]
SUBSET = [
    "test_layouts.py::test_layout_selects_and_updates_as_the_reference[tp2-high]",
    "test_layouts.py::test_layout_selects_and_updates_as_the_reference[tp2 dp2 overlapped-high]",
    "test_faults.py::test_an_empty_or_broken_refresh_keeps_the_mask_on_every_rank",  # of two
    "test_versions.py::test_the_launcher_works_here",
]

pytestmark = pytest.mark.timeout(400)


def test_versions_are_read_as_megatron_writes_them() -> None:
    assert version_of("0.19.2+5f48164") == (0, 19)
    assert version_of("0.16.0rc0") == (0, 16)
    assert installed() >= OLDEST
    assert installed() <= NEWEST_TESTED or ".venv-" in sys.prefix  # of a checkout of its main


def test_old_ones_are_refused_and_new_ones_warned_of() -> None:
    with pytest.raises(ValueError, match=r"this is megatron-core 0\.15; LongAct needs 0\.16 or newer"):
        check_version(version_of("0.15.3"))
    assert check_version(OLDEST) is check_version(NEWEST_TESTED) is None
    assert check_version(version_of("0.21.0")) == "LongAct is tested with megatron-core 0.16 to 0.19, and this is 0.21"


def test_programs_refuse_an_old_one_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = tmp_path / "megatron/core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 2\nPRE_RELEASE = ''\n")
    check_programs("anything")
    monkeypatch.syspath_prepend(str(tmp_path))
    calls = {
        "the RL program": ["train", "--longact"],
        "conversion to Megatron": [
            "convert",
            "to-megatron",
            "--hf-dir",
            str(tmp_path),
            "--save",
            str(tmp_path / "new"),
        ],
        "this command": ["evaluate", "--benchmark", "needle", "--load", str(tmp_path)],
    }
    monkeypatch.setattr(sys, "argv", ["longact"])
    for what, command in calls.items():
        assert main(command) == 1
        told = capsys.readouterr().err.strip()
        assert f"this is megatron-core 0.18; {what} needs 0.19 or newer: LongAct itself" in told.splitlines()[-1]


def set_up(version: str) -> Path:
    """The Python of an environment with that megatron-core."""
    made = run_command(["bash", str(ROOT / "scripts/setup_megatron.sh"), version], timeout=200, environment={})
    if "No matching distribution" in made.stderr or "Could not find a version" in made.stderr:
        pytest.skip(f"no megatron-core {version} here: pip found none")
    assert made.returncode == 0, made.stderr
    return ROOT / f".venv-megatron-{version}/bin/python"


@pytest.fixture(scope="module", params=OTHERS)
def python(request: pytest.FixtureRequest) -> Path:
    if sys.prefix == sys.base_prefix or not (ROOT / ".venv").exists() or ".venv-" in sys.prefix:
        pytest.skip("from .venv alone, whose packages are shared")
    return set_up(request.param)


def test_the_library_works_with(python: Path) -> None:
    tests = [f"tests/{test}" for test in SUBSET]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = run_command(command, timeout=200, environment={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-4000:]
    done = re.search(r"^([.s]+) +\[100%\]$", result.stdout, re.MULTILINE)
    assert done is not None, result.stdout
    assert sorted(done[1]) == [*"....", "s" if "0.16" in str(python) else "."]  # the launcher


@pytest.mark.skipif(installed() >= NEWEST_TESTED, reason="the launcher's own tests are in test_run.py")
@pytest.mark.skipif(find_spec("megatron.training") is None, reason="0.16's wheel has no megatron.training")
def test_the_launcher_works_here() -> None:
    from tests.test_run import TRAINING

    result = run_program("tests/programs/pretrain_older.py", *TRAINING, "--longact")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "LongAct ends at update 2: in 2 steps" in result.stdout
