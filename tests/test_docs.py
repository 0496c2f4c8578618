"""What the pages say that can be held: files, links, flags, tests and commands that they name are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.commands import plan
from tests.launch import ROOT
from tests.ranks import run_program

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
PYTHON = re.MULTILINE | re.DOTALL
FOLDERS = "docs|examples|megatron_longact|scripts|tests|tools"
_OTHER_PROGRAMS = """
    --hook-type --cov --numprocesses --dist --pdb --timeout --no-index --find-links --nproc-per-node --standalone
    --kill-on-bad-exit --signal --batch --array --export --open-mode --help --version
    --custom-config-path --custom-megatron-init-path
    --custom-megatron-before-train-step-hook-path --data-pad-size-multiplier
    --no-deps --delay-wgrad-compute --flags
"""
"""Of pip, pytest, pre-commit, torchrun and Slurm, and of trainers that a page is about."""
MEGATRON = Path(find_spec("megatron.core").origin).parent.parent  # type: ignore[union-attr, arg-type]
_NOT_OURS = ("examples/rl/environment_configs",)
"""A folder of Megatron-LM."""


def words_in_code(text: str) -> list[str]:
    """What stands between backticks, or in a block of code."""
    blocks = re.findall(r"^```.*?^```|^    \S.*?$", text, re.MULTILINE | re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))]


def of_each_page(pattern: str) -> list[tuple[str, str]]:
    """(page, match) of each page's code, each once."""
    found = {
        (page, m) for page, text in TEXT.items() for code in words_in_code(text) for m in re.findall(pattern, code)
    }
    return sorted(found)


def test_files_that_are_named_exist() -> None:
    missing = [
        (page, name)
        for page, name in of_each_page(rf"(?<![\w/.$}}-])((?:{FOLDERS})/[\w./*-]*\w)")
        if not list(ROOT.glob(name)) and name not in _NOT_OURS
    ]
    assert not missing


def test_links_lead_somewhere() -> None:
    broken = []
    for page, text in TEXT.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            there = "://" in target or file.exists()
            if not there or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
                broken.append((page, target))
    assert not broken


def anchors(text: str) -> set[str]:
    """Of a page's headings, as they are made on GitHub."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def known_flags() -> set[str]:
    """Flags that stand in Megatron's files, which need not be imported for it, and in our own code and scripts."""
    known = set()
    for file in [*MEGATRON.glob("training/**/*.py"), *MEGATRON.glob("core/**/*config*.py")]:
        text = file.read_text()
        known |= set(re.findall(r"--[a-z][\w-]*\w", text))
        fields = re.findall(r"^    (\w+):", text, re.MULTILINE)  # of a dataclass, out of which its parser makes flags
        known |= {f"--{prefix}{name.replace('_', '-')}" for name in fields for prefix in ("", "no-")}
    sources = [
        path for folder in FOLDERS.split("|")[1:] for path in (ROOT / folder).rglob("*") if path != Path(__file__)
    ]
    for path in sources:
        if path.suffix in (".py", ".sh"):
            known |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", path.read_text()))
    pages = (TEXT["docs/flags.md"], TEXT["docs/program-flags.md"])  # held to be the parsers' by test_config.py
    known |= {flag for page in pages for flag in re.findall(r"^\| `(--[\w-]+)`", page, re.MULTILINE)}
    return known | plan_flags() | set(_OTHER_PROGRAMS.split())


def plan_flags() -> set[str]:
    return {flag for action in plan.parser_of_plans()._actions for flag in action.option_strings}


def test_flags_that_are_named_exist() -> None:
    named = of_each_page(r"(?<![\w-])(--[a-z][\w-]*\w)(?![\w*-])")
    assert len(named) > 300
    assert not [(page, flag) for page, flag in named if flag not in known_flags()]


def test_tests_that_are_named_exist() -> None:
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):  # of one name there may be several, in tests/ and in tests/gpu/
        files[path.name] = files.get(path.name, "") + path.read_text()
    names = {name for text in files.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    missing = [(page, name) for page, name in of_each_page(r"(?<![\w.])(test_\w+)(?![\w*.]|\.\.)") if name not in names]
    missing += [(page, name) for page, name in of_each_page(r"(test_\w+\.py)") if name not in files]
    for page, (file, name) in ((page, each) for page, each in of_each_page(r"(test_\w+\.py)::(test_\w+)")):
        if f"def {name}(" not in files.get(file, ""):
            missing.append((page, f"{file}::{name}"))
    assert not missing


def test_what_python_on_the_pages_imports_is_there() -> None:
    """Each block is Python; what it takes from here, and the attributes of modules that it takes, exist."""
    blocks = [
        (page, block) for page, text in TEXT.items() for block in re.findall(r"^```python\n(.*?)^```", text, PYTHON)
    ]
    assert len(blocks) > 6
    for page, block in blocks:
        names: dict[str, Any] = {}
        nodes = list(ast.walk(ast.parse(block, filename=page)))
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_longact"):
                exec(ast.unparse(node), names)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                assert hasattr(names[node.value.id], node.attr), (page, ast.unparse(node))


def test_targets_of_make_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not [(page, name) for page, name in of_each_page(r"(?<![\w-])make ([a-z-]+)\b") if name not in targets]


@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("pdoc") is None, reason="needs pdoc (the dev extra)")
def test_the_api_reference_has_no_warning_and_no_broken_link(tmp_path: Path) -> None:
    """And a page for each module, the public ones first."""
    tool = str(ROOT / "tools/generate_api_reference.py")
    done = run_program(tool, "--quick", "--output", str(tmp_path), launcher=False, cpu=False, timeout=280)
    assert done.returncode == 0, done.stderr
    names = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "megatron_longact").rglob("*.py")]
    pages = {name.parent if name.name == "__init__" else name for name in names}
    assert {page.relative_to(tmp_path).with_suffix("") for page in tmp_path.rglob("*.html")} == pages | {Path("index")}
    assert "LongAct.attach" in (tmp_path / "megatron_longact.html").read_text()
    index = (tmp_path / "index.html").read_text()
    assert index.index("megatron_longact/config.html") < index.index("megatron_longact/saliency.html")


def test_the_tree_of_the_architecture_is_the_package() -> None:
    tree = TEXT["docs/architecture.md"].split("```")[1]
    named = set(re.findall(r"^  (\w+(?:\.py|/))  ", tree, re.MULTILINE))
    package = ROOT / "megatron_longact"
    there = {path.name for path in package.glob("*.py")} | {
        f"{path.parent.name}/" for path in package.glob("*/__init__.py")
    }
    assert named == there


def test_the_plans_on_the_page_are_what_the_tool_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^\| [\d,]+ \| `(--model [^`]+)` \| (.*) \|$", TEXT["docs/planning.md"], re.MULTILINE)
    assert len(rows) == 7
    for flags, numbers in rows:
        given = flags.replace("…", "--first-stage-layers 5 --last-stage-layers 5").split()
        assert plan.main([*given, "--global-batch-size", "256"]) == 0
        shown = capsys.readouterr().out
        for number in numbers.split(" | "):
            if number.endswith("%"):  # to two digits there
                shares = {f"{float(share):.2f}%" for share in re.findall(r"\+(\d+\.\d+)%", shown)}
                assert number in shares, (flags, number)
            else:
                assert number in shown, (flags, number)
