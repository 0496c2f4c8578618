"""`longact compat`: whether a trainer that is installed is one that LongAct attaches to."""

from pathlib import Path

import pytest

from megatron_longact.commands import compat
from megatron_longact.trainers import TRAINERS, Trainer, look
from tests.launch import ROOT
from tests.test_docs import TEXT


@pytest.fixture(params=sorted(set(TRAINERS) - {"megatron-lm"}))
def installed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Path]:
    """A trainer whose package has what the hook needs and no more, as pip leaves it."""
    trainer = TRAINERS[request.param]
    for seam in trainer.seams:
        path = tmp_path / trainer.package / seam.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{seam.text}\n")
    (tmp_path / trainer.package / "__init__.py").touch()
    said(trainer, tmp_path, f"{trainer.newest}.9")
    monkeypatch.syspath_prepend(tmp_path)
    return trainer, tmp_path


def said(trainer: Trainer, folder: Path, version: str) -> None:
    info = folder / f"{trainer.distribution.replace('-', '_')}-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {trainer.distribution}\nVersion: {version}\n")


def test_what_attaches_says_by_which_setting(installed: tuple[Trainer, Path]) -> None:
    trainer, _ = installed
    told = look(trainer, megatron="0.18.2")
    assert f"{trainer.name} {trainer.newest}.9 with megatron-core 0.18.2: LongAct attaches" in told
    assert all(line in told for line in (*trainer.setting.splitlines(), *trainer.fails))
    assert "is tested with megatron-core 0.16 to 0.19, and this is 0.23" in look(trainer, megatron="0.23.0rc1")


def test_what_does_not_attach_says_why_in_one_line(installed: tuple[Trainer, Path]) -> None:
    trainer, folder = installed
    with pytest.raises(ValueError, match="has no megatron-core here"):
        look(trainer, megatron=None)
    with pytest.raises(ValueError, match=r"this is megatron-core 0\.15; LongAct needs 0\.16 or newer"):
        look(trainer, megatron="0.15.3")
    said(trainer, folder, "77.1")
    with pytest.raises(ValueError, match=rf"{trainer.name} 77\.1 is not known"):
        look(trainer, megatron="0.18.2")
    said(trainer, folder, f"{trainer.oldest}.0")
    path = folder / trainer.package / trainer.seams[-1].file
    path.write_text(path.read_text().replace(trainer.seams[-1].text, "moved"))
    with pytest.raises(ValueError, match="where LongAct would attach"):
        look(trainer, megatron="0.18.2")
    for info in folder.glob("*.dist-info"):
        (info / "METADATA").unlink()
        info.rmdir()
    with pytest.raises(ValueError, match="its version is not known"):
        look(trainer, megatron="0.18.2")


def test_the_command_ends_with_0_where_it_attaches_and_else_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main(["--trainer", "megatron-lm"]) == 0
    assert "-m megatron_longact.run" in capsys.readouterr().out
    assert compat.main(["--trainer", "Slime"]) == 1  # case does not matter
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "compat: slime is not installed here: there is no package 'slime'\n")


def test_settings_name_files_and_pages_that_are_there() -> None:
    for trainer in TRAINERS.values():
        assert not trainer.file or (ROOT / "examples/integrations" / trainer.file).is_file()
        if trainer.file:
            assert trainer.file in TEXT["docs/integrations.md"]
