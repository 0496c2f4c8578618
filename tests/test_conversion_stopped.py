"""A conversion that is killed, or that fails half way: the target is not there, and the next one goes on."""

import hashlib
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.conversion import staging, to_hf, to_megatron
from tests.conversion import (
    MLP_WEIGHT,
    assert_bitwise,
    make_hf,
    rewrite,
    shard_of,
    tensors_of,
)
from tests.launch import ROOT
from tests.ranks import run_program

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("direction", ["to megatron", "to hf"])
def test_a_write_that_fails_half_way_names_the_tensor_and_leaves_nothing(tmp_path: Path, direction: str) -> None:
    """A file-size limit fails in the same place as a full disk, and needs no disk to fill."""
    make_hf("qwen3", tmp_path / "hf")
    to_megatron.convert(tmp_path / "hf", tmp_path / "megatron")
    save = tmp_path / "out"
    arguments = {
        "to megatron": ["convert_hf_to_megatron.py", "--hf-dir", tmp_path / "hf"],
        "to hf": ["convert_megatron_to_hf.py", "--load", tmp_path / "megatron", "--hf-config", tmp_path / "hf"],
    }[direction]
    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED.format(limit=20_000))
    command = [limited, ROOT / "tools" / arguments[0], *arguments[1:], "--save", save]
    result = run_program(*map(str, command), launcher=False, cpu=False)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert re.search(r"cannot write .*model\.\S+\.weight", result.stderr)
    assert "File too large" in result.stderr
    assert not save.exists()
    assert not save.with_name("out.partial").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_longact.conversion import staging, to_hf, to_megatron
note, left = staging.Staging.note, [2]
def note_then_die(self, unit, record):
    note(self, unit, record)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.note = note_then_die
"""


TO_MEGATRON = "to_megatron.convert(Path(sys.argv[1]), Path(sys.argv[2]))"


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C, when two files are finished."""
    note, left = staging.Staging.note, [2]

    def note_then_stop(self: staging.Staging, unit: str, record: Any) -> None:
        note(self, unit, record)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(staging.Staging, "note", note_then_stop)
        yield
    assert not left[0]


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".metadata")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_killed_conversion_is_not_there_and_goes_on(hf: Path, tmp_path: Path) -> None:
    whole, target = tmp_path / "whole", tmp_path / "megatron"
    to_megatron.convert(hf, whole)
    program = tmp_path / "killed.py"
    program.write_text(KILLED + TO_MEGATRON)
    killed = run_program(str(program), str(hf), str(target), launcher=False, cpu=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = target.with_name("megatron.partial")
    files = {file: file.stat().st_mtime_ns for file in (partial / "release").glob("*.distcp")}
    assert len(files) == 2
    message = to_megatron.convert(hf, target)
    assert "were there already" in message
    assert not partial.exists()
    for file, written in files.items():
        assert (target / "release" / file.name).stat().st_mtime_ns == written
    assert digests(target) == digests(whole)


def test_interrupted_way_back_goes_on(hf: Path, tmp_path: Path) -> None:
    load, target = tmp_path / "megatron", tmp_path / "back"
    to_megatron.convert(hf, load)
    with interrupted():
        to_hf.convert(load, hf, target, max_shard_bytes=40_000)
    assert not target.exists()
    files = list((tmp_path / "back.partial").glob("*.safetensors"))
    assert len(files) == 2
    written = [file.stat().st_mtime_ns for file in files]
    assert "were there already" in to_hf.convert(load, hf, target, max_shard_bytes=40_000)
    assert [(target / file.name).stat().st_mtime_ns for file in files] == written
    assert_bitwise(tensors_of(target), tensors_of(hf))


def test_another_source_is_not_mixed_in(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    with interrupted():
        to_megatron.convert(hf, target)
    rewrite(shard_of(hf, MLP_WEIGHT), lambda tensors: tensors.update({MLP_WEIGHT: tensors[MLP_WEIGHT] + 1}))
    os.utime(shard_of(hf, MLP_WEIGHT), ns=(0, 0))
    assert "were there already" not in to_megatron.convert(hf, target)
    to_hf.convert(target, hf, tmp_path / "back")
    assert_bitwise(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging.staged(target, source=1, sizes=[]) as first:
        (first.path / "file").write_text("ours")
        with (
            pytest.raises(ValueError, match="another process is writing"),
            staging.staged(target, source=1, sizes=[]),
        ):
            raise AssertionError
    assert (target / "file").read_text() == "ours"
