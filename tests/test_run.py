"""The launcher: real processes, torchrun where it has a part in the matter, programs that know nothing of LongAct."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_longact import run
from megatron_longact.megatron import quiet
from tests.launch import run as run_command
from tests.ranks import run_program

PROGRAMS = Path(__file__).parent / "programs"
LAUNCHER = ["-m", "megatron_longact.run"]
_TRAINING = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8
    --group-query-attention --num-query-groups 2 --qk-layernorm --normalization RMSNorm --swiglu
    --disable-bias-linear --position-embedding-type rope --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-iters 0 --eval-interval 1000
    --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 64 --log-interval 1
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
"""
TRAINING = _TRAINING.split()
TP2 = ["--tensor-model-parallel-size", "2"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "LONGACT_TRACEBACK": ""}

pytestmark = pytest.mark.timeout(300)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments`."""
    return run_command([sys.executable, *arguments], timeout=240, environment=ENVIRONMENT)


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program on ranks that torchrun starts."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments)


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(str(PROGRAMS / "pretrain_plain.py"), *TRAINING, *TP2, *arguments, world_size=2)


def losses(output: str) -> list[str]:
    return re.findall(r"lm loss: (\S+)", output)


@pytest.fixture(scope="module")
def without_longact() -> subprocess.CompletedProcess[str]:
    return pretrain()


def test_program_runs_unchanged(without_longact: subprocess.CompletedProcess[str]) -> None:
    assert without_longact.returncode == 0, without_longact.stderr
    assert len(losses(without_longact.stdout)) == 2
    assert "LongAct" not in without_longact.stdout


def test_longact_attaches_to_an_unchanged_program(without_longact: subprocess.CompletedProcess[str]) -> None:
    result = pretrain("--longact", "--longact-ratio", "0.25")
    assert result.returncode == 0, result.stderr
    first, second = losses(result.stdout)
    wanted_first, wanted_second = losses(without_longact.stdout)
    assert first == wanted_first
    assert second != wanted_second
    said = [line for line in result.stdout.splitlines() if line.startswith("LongAct")]
    assert "ratio=0.25" in next(line for line in said if "starts fresh" in line)
    found = re.fullmatch(
        r"LongAct ends at update 2: in 2 steps (\d+) of (\d+) Q/K rows were updated at some step, (\d+) were frozen in "
        r"all; LongAct took (\d+\.\d)% of the steps' time on rank 0",
        said[-1],
    )
    assert found is not None, said
    updated, rows, frozen = map(int, found.groups()[:3])
    assert rows == 2 * (32 + 16) == updated + frozen  # two layers, four heads and two groups of eight channels
    assert 0.25 * rows <= updated <= 0.5 * rows  # a quarter in each of two steps


def test_what_is_only_preparation_is_left_out_unless_asked_for(
    without_longact: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = without_longact.stdout + without_longact.stderr
    assert "iteration        2/" in shown
    assert "consumed_train_samples" not in shown  # of 800 lines of arguments
    assert "UserWarning" not in shown
    assert len(shown.splitlines()) < 80, shown
    monkeypatch.setenv(quiet.VERBOSE, "")
    run._parse(["--verbose", "--cpu", __file__])
    assert quiet.verbose()


def test_refusal_is_one_line_from_one_rank() -> None:
    result = pretrain("--longact", "--longact-ratio", "7")
    assert result.returncode != 0
    ours = [text for text in result.stderr.splitlines() if text.startswith("megatron_longact:")]
    assert len(ours) == 1
    assert "--longact-ratio" in ours[0]
    assert "pretrain_plain.py" not in result.stderr
    assert not losses(result.stdout)


def test_failing_rank_speaks_first_and_ends_all() -> None:
    result = torchrun(*LAUNCHER, "--cpu", str(PROGRAMS / "one_rank_fails.py"))
    assert result.returncode != 0
    errors = re.findall(r"^(?:\[rank\d\]: ?)?(\w*Error\b.*)", result.stderr, re.MULTILINE)
    assert errors[0] == "RuntimeError: the last rank gives up"
    own_frames = re.findall(r'File "(.+?)"', result.stderr.split("the last rank gives up")[0])
    assert own_frames == [str(PROGRAMS / "one_rank_fails.py")]


def test_warnings_of_other_libraries_are_left_out_and_ours_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(verbose: str, options: list[str]) -> list[str]:
        monkeypatch.setenv(quiet.VERBOSE, verbose)
        monkeypatch.setattr(sys, "warnoptions", options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            quiet.quiet_libraries()
            for number, module in enumerate(("megatron.core.optimizer", "torch", "megatron_longact.run", "__main__")):
                warnings.warn_explicit(module, UserWarning, "file", number, module=module)
        return [str(each.message) for each in caught]

    for name in ("PYTHONWARNINGS", "TORCH_LOGS"):
        monkeypatch.setenv(name, "")  # what child processes are told is taken back
    assert shown("", []) == ["megatron_longact.run", "__main__"]
    assert len(shown("1", [])) == len(shown("", ["default"])) == 4


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_program_sees_what_python_would_show_it(as_module: bool) -> None:
    program = ["-m", "tests.programs.show_main"] if as_module else [str(PROGRAMS / "show_main.py")]
    plain = python(*program, "a", "--b")
    launched = python(*LAUNCHER, "--cpu", *program, "a", "--b")
    assert launched.returncode == plain.returncode == 7, launched.stderr
    wanted, got = json.loads(plain.stdout), json.loads(launched.stdout.splitlines()[-1])
    added = got["here"]["argv"][3:]
    assert "--distributed-backend=gloo" in added
    for process in ("here", "spawned"):
        wanted[process]["argv"] += added
        assert got[process] == wanted[process]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no program given"),
        (["--cpu"], "no program given"),
        (["-m"], "-m needs the name of a module"),
        (["--gpu", "x.py"], "--gpu comes before SCRIPT"),
        (["no/such/file.py"], "cannot read the program 'no/such/file.py': No such file or directory"),
        (["tests"], "cannot read the program 'tests': Is a directory"),
    ],
    ids=str,
)
def test_bad_call_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert run.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert line in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    assert "--cpu" in capsys.readouterr().out
