"""Megatron's compiled index builder is used where a wheel brings it, and made where there is a Makefile."""

import subprocess
from pathlib import Path

import pytest
from megatron.core.datasets import utils

from megatron_longact.megatron.dataset_helpers import keep_what_is_built

Makes = list[list[str]]


@pytest.fixture
def makes(monkeypatch: pytest.MonkeyPatch) -> Makes:
    """The calls of `make` from now on, which all succeed."""
    commands: Makes = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(utils, "compile_helpers", utils.compile_helpers)  # put back at the end
    return commands


def test_a_wheel_is_taken_as_it_is(makes: Makes) -> None:
    assert not Path(utils.__file__).with_name("Makefile").exists()
    utils.compile_helpers()
    assert len(makes) == 1  # and fails, without a Makefile
    keep_what_is_built(of_any_megatron=False)
    utils.compile_helpers()
    assert len(makes) == 1


def test_a_checkout_is_left_to_make(makes: Makes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    keep_what_is_built(of_any_megatron=False)
    utils.compile_helpers()
    assert len(makes) == 1


def test_without_a_compiler_an_installed_one_will_do(
    makes: Makes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    keep_what_is_built(of_any_megatron=True)
    utils.compile_helpers()
    assert makes == []
