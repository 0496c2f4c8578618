"""tools/kill_and_resume.py: how it starts a run, and what it says of one that ends before it is killed."""

import importlib.util
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import ROOT

TOOL = ROOT / "tools/kill_and_resume.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOL.parent)  # as when it is run: it imports another tool
        spec = importlib.util.spec_from_file_location("kill_and_resume", TOOL)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "kill_and_resume", module)
        spec.loader.exec_module(module)
        yield module


def test_the_demo_runs_under_the_python_of_the_tool(tool: Any) -> None:
    bash, option, script, folder = tool.demo()
    shown = subprocess.run(
        [bash, option, f'exec() {{ printf "%s\\n" "$@"; }}\n{script}', folder.replace("{dir}", "two words")],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    words = shown.stdout.splitlines()
    assert words[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert words[words.index("--cpu") + 1] == "examples/train_grpo.py"
    assert words[words.index("--run-dir") + 1] == "two words"


def test_a_tool_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--work-dir", str(tmp_path / "work"), "--horizon", "60"]
    program = f"echo $$ > {shlex.quote(str(tmp_path / 'pid'))}; sleep 60"
    with subprocess.Popen([*command, "--", "bash", "-c", program], stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 30
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["no-such-program"], "no-such-program could not be started: No such file or directory"),
        (["bash", "-c", "exec no-such-program"], "the run could not be started, exit code 127: "),
        (
            ["bash", "-c", "echo the last line; exit 3"],
            "after 0 kills the run failed, exit code 3: the last line; see ",
        ),
        (["true"], "after 0 kills the run came to its end: give it more iterations; see "),
    ],
    ids=["no program", "none in the shell", "failed", "ended"],
)
@pytest.mark.parametrize("aim", ["any moment", "a save"])
def test_a_run_that_ends_by_itself(
    tool: Any, command: list[str], said: str, aim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--work-dir", str(tmp_path), "--horizon", "20", "--", *command])
    monkeypatch.setattr(tool, "AIMS", (aim,))
    with pytest.raises(SystemExit, match=f"(?s){said}") as ended:
        tool.main()
    assert "torchrun" not in str(ended.value)


def test_a_run_that_fails_after_the_last_kill(tool: Any, tmp_path: Path) -> None:
    run = tool.Run(["bash", "-c", "exit 4"], tmp_path / "run")
    with pytest.raises(SystemExit, match=f"the run in {tmp_path}/run failed, exit code 4: ; see "):
        tool.finish(run, seconds=20)
    slow = tool.Run(["sleep", "100"], tmp_path / "slow")
    with pytest.raises(SystemExit, match=r"took more than 0\.1 s"):
        tool.finish(slow, seconds=0.1)
