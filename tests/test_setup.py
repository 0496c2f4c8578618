"""The scripts behind `make setup`: which Python they take, and that nothing half-made is left."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THIS_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
REAL_PYTHON = Path(sys.base_prefix) / "bin" / f"python{THIS_VERSION}"
TOOLS = ("bash", "cat", "cksum", "dirname", "rm", "sed", "sort", "tail", "tee")

pytestmark = pytest.mark.skipif(not REAL_PYTHON.exists(), reason="the interpreter is not where CPython puts it")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with a few tools on the PATH, an empty home and no Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    (tmp_path / "home").mkdir()
    return {"PATH": str(tools), "HOME": str(tmp_path / "home")}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def real_python(path: Path) -> Path:
    return script(path, f'#!{shutil.which("bash")}\nexec "{REAL_PYTHON}" "$@"\n')


def find_python(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(shutil.which("bash")), "scripts/find_python.sh"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        (None, f".pyenv/versions/{THIS_VERSION}.99/bin"),
        ("PYENV_ROOT", f"versions/{THIS_VERSION}.0/bin"),
        (None, f".local/share/uv/python/cpython-{THIS_VERSION}.9-linux-x86_64-gnu/bin"),
        ("UV_PYTHON_INSTALL_DIR", f"cpython-{THIS_VERSION}.9-macos-aarch64-none/bin"),
    ],
)
def test_finds_installed_versions(bare: dict[str, str], tmp_path: Path, variable: str | None, folder: str) -> None:
    base = Path(bare["HOME"]) if variable is None else tmp_path / "elsewhere"
    if variable is not None:
        bare[variable] = str(base)
    expected = real_python(base / folder / "python")
    assert find_python(bare).stdout.strip() == str(expected)


def test_passes_over_a_shim_that_does_not_answer(bare: dict[str, str], tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    for name in ("python3.12", "python3.13", "python3", "python"):
        script(shims / name, "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    bare["PATH"] = f"{shims}{os.pathsep}{bare['PATH']}"
    expected = real_python(Path(bare["HOME"]) / f".pyenv/versions/{THIS_VERSION}.1/bin/python")
    assert find_python(bare).stdout.strip() == str(expected)


def test_takes_a_named_python_and_no_other(bare: dict[str, str], tmp_path: Path) -> None:
    real_python(Path(bare["HOME"]) / f".pyenv/versions/{THIS_VERSION}.1/bin/python")
    named = real_python(tmp_path / "mine" / "python")
    assert find_python(bare | {"PYTHON": str(named)}).stdout.strip() == str(named)
    assert find_python(bare | {"PYTHON": "/nowhere/python"}).returncode != 0


def test_one_line_says_what_to_install(bare: dict[str, str]) -> None:
    found = find_python(bare)
    assert found.returncode != 0
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert "install" in found.stderr
    assert "3.12" in found.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the setup reads of a checkout."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def set_up(project: Path, bare: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`make setup` without an index: an installation fails, and nothing is downloaded."""
    env = bare | {"PYTHON": str(REAL_PYTHON), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [str(shutil.which("bash")), "scripts/setup.sh"]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=100)


def test_a_setup_that_fails_leaves_no_venv(bare: dict[str, str], project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)  # nobody's: it holds no file
    done = set_up(project, bare)
    assert done.returncode != 0
    assert "did not finish" in done.stderr
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_a_venv_of_somebody_else_is_left_alone(bare: dict[str, str], project: Path, linked: bool) -> None:
    venv = project.parent / "mine" if linked else project / ".venv"
    venv.mkdir()
    if linked:
        (project / ".venv").symlink_to(venv)
        (venv / "complete").write_text("of another checkout")
    (venv / "pyvenv.cfg").write_text("home = /nowhere")
    done = set_up(project, bare)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "did not make" in done.stderr
    assert "move it away, or install into it with .venv/bin/python -m pip install" in done.stderr
    assert (project / ".venv").is_symlink() == linked
    assert (venv / "pyvenv.cfg").read_text() == "home = /nowhere"


def made_here(project: Path) -> Path:
    """A .venv as a finished setup leaves it, but empty; its pip installs nothing."""
    venv = project / ".venv"
    subprocess.run([REAL_PYTHON, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    stamp = r"{ pwd; cat constraints.txt; sed '/^\[tool\./,$d' pyproject.toml; } | cksum > .venv/complete"
    subprocess.run(["bash", "-c", stamp], cwd=project, check=True)
    (venv / "setup.log").touch()
    script(venv / "lib" / f"python{THIS_VERSION}" / "site-packages" / "pip" / "__init__.py", "")
    script(venv / "lib" / f"python{THIS_VERSION}" / "site-packages" / "pip" / "__main__.py", "raise SystemExit(1)")
    script(venv / "bin" / "tool", f"#!{venv}/bin/python\n'{project}'\n{project}-other\n")
    return venv


def test_a_moved_checkout_takes_its_venv_along(bare: dict[str, str], project: Path, tmp_path: Path) -> None:
    made_here(project)
    moved = project.rename(tmp_path / "elsewhere")
    done = set_up(moved, bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"setup: this checkout was in {project}: mending the paths in .venv\n"
    tool = (moved / ".venv" / "bin" / "tool").read_text()
    assert tool == f"#!{moved}/.venv/bin/python\n'{moved}'\n{project}-other\n"
    again = set_up(moved, bare)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_other_pins_are_installed_where_it_stands(bare: dict[str, str], project: Path) -> None:
    venv = made_here(project)
    with (project / "constraints.txt").open("a") as file:
        file.write("one-more==1.0\n")
    done = set_up(project, bare)
    assert done.returncode != 0
    assert "bringing .venv up to date" in done.stdout
    assert "as far as it came" in done.stderr
    assert (venv / "bin" / "tool").exists()


def test_an_installation_brings_the_package_alone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(project)], check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"megatron_longact", "megatron_longact-0.1.0.dist-info"}
    wanted = {"megatron_longact/py.typed", "megatron_longact/longact.py", "megatron_longact/tasks/needle.py"}
    assert wanted <= set(names)


def test_setup_py_says_what_pyproject_toml_does() -> None:
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--name", "--version"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said.stdout.split() == [project["name"], project["version"]]
