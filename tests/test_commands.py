"""`longact` and its commands; what they do is tested with the tools of the same names."""

import importlib.util
import os
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from megatron_longact.__main__ import COMMANDS, main
from megatron_longact.commands.train import launched
from megatron_longact.megatron.tool_command import check_new
from tests.launch import ROOT


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["longact"])
    monkeypatch.setenv("LONGACT_VERBOSE", "1")


def test_the_map_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^  (\S+(?: \S+)*)  +\S", shown, re.MULTILINE) == list(COMMANDS)
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert "torchrun --standalone --nproc-per-node N -m megatron_longact COMMAND" in shown
    assert main(["convert", "--help"]) == 0
    assert re.findall(r"^  (convert \S+)", shown := capsys.readouterr().out, re.MULTILINE) == [
        "convert to-megatron",
        "convert to-hf",
    ]
    assert "observe" not in shown


@pytest.mark.parametrize("argv", [[], ["convert"], ["observ", "--hf-dir", "x"], ["convert", "to-paper"]])
def test_what_is_no_command_ends_with_2_and_the_map(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    told = capsys.readouterr()
    assert "convert to-hf" in told.out + told.err
    if argv and argv != ["convert"]:
        assert told.err.splitlines()[-1] == f"longact: no command {' '.join(argv[:2])!r}"


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"train"}))  # whose help is Megatron's: test_train_grpo.py
def test_each_command_says_how_it_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: longact {name} [-h]")
    assert f"    longact {name}" in shown or f"-m megatron_longact {name}" in shown
    if COMMANDS[name][1].endswith("(ranks)"):
        assert re.search(rf"torchrun .* -m megatron_longact {name} ", shown)


def test_a_command_runs_and_its_tool_is_the_same_function(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "plan",
        "--model",
        "qwen3-8b",
        "--tp",
        "4",
        "--cp",
        "2",
        "--seq-length",
        "32768",
        "--global-batch-size",
        "256",
    ]
    assert main(flags) == 0
    assert "qwen3-8b" in capsys.readouterr().out
    assert main([*flags, "--longact-ratio", "2"]) == 1
    assert capsys.readouterr().err.startswith("plan: --longact-ratio is 2.0")
    for module, _ in COMMANDS.values():
        tool = ROOT / f"tools/{module}.py"
        if module == "train":
            continue
        spec = importlib.util.spec_from_file_location(f"{module}_tool", tool)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        assert loaded.main is import_module(f"megatron_longact.commands.{module}").main


@pytest.mark.parametrize(
    "argv",
    [
        "observe --hf-dir x --output FILE/out",
        "observe --hf-dir x --html FILE/page.html --output NEW",
        "stability --hf-dir x --html FILE/page.html --output NEW",
        "disrupt --load x --html FILE/page.html --output NEW",
        "disrupt --load x --output FILE/out",
        "emulate-fp8 --hf-dir x --output FILE/out",
        "evaluate --benchmark needle --load x --output FILE/out",
        "plan --model qwen3-8b --seq-length 8192 --global-batch-size 8 --json FILE/plan.json",
        "audit x y --json FILE/audit.json",
        "export-mask --load x --save FILE/mask.safetensors",
    ],
)
def test_a_file_in_the_way_of_results_is_named_in_one_line(
    argv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = argv.replace("FILE", str(tmp_path / "file")).replace("NEW", str(tmp_path / "new")).split()
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(tmp_path / "file") in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_into_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="closed cannot be written into: give another --output"):
        check_new(tmp_path / "closed" / "new" / "results.json", overwrite=True)


def test_training_is_the_launcher_with_its_own_flags_first() -> None:
    program = ["-m", "megatron_longact.rl.train"]
    assert launched(["--cpu", "--longact", "--cpu"]) == ["--cpu", *program, "--longact", "--cpu"]
    assert launched(["--help"]) == [*program, "--help"]


def test_the_console_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["longact"].split(":")
    assert getattr(import_module(module), function) is main
