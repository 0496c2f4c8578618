"""docs/quickstart.md, run as it stands: what a newcomer types, and what is there then."""

import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_longact.__main__ import main
from megatron_longact.commands import from_hf
from tests.conversion import make_hf, tensors_of
from tests.launch import QUIET, ROOT, run

pytestmark = pytest.mark.timeout(300)
PAGE = (ROOT / "docs/quickstart.md").read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_leads_from_a_folder_to_a_trained_one(tmp_path: Path) -> None:
    assert len(COMMANDS) == 3
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**QUIET, "PATH": path, "PYTHONPATH": str(ROOT)}
    script = "\n".join([f"cd {tmp_path}", *COMMANDS, COMMANDS[-1]])
    done = run(["bash", "-euo", "pipefail", "-c", script], timeout=280, environment=environment)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs/quickstart/out"
    before, after = tensors_of(tmp_path / "runs/quickstart/model"), tensors_of(out / "hf")
    assert after.keys() == before.keys()
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    mask = load_file(out / "updated-rows.safetensors")[q_proj.removesuffix(".weight")]
    assert 0 < mask.float().mean() < 1
    changed = (after[q_proj] != before[q_proj]).any(1)
    assert changed.any()
    assert not (changed & ~mask).any()
    on_the_way = tensors_of(out / "hf-iter_0000002")
    assert any(not torch.equal(on_the_way[name], before[name]) for name in before)
    assert any(not torch.equal(on_the_way[name], after[name]) for name in before)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / "hf" / name).read_bytes() == (tmp_path / "runs/quickstart/model" / name).read_bytes()
    assert "\nmasked rows changed inside the mask: " in done.stdout
    assert ", outside: 0; of their elements" in done.stdout
    assert json.loads((out / "audit.json").read_text())["total"]["changed_outside"] == 0
    steps = re.findall(r"^\$ longact (\S+(?: to-\S+)?)", done.stdout, re.MULTILINE)
    assert steps == ["convert to-megatron", "train", "convert to-hf", "export-mask", "audit"]  # the second call: none
    assert done.stdout.count("is the trained model") == 2


def test_what_cannot_go_in_one_go_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["longact"])
    make_hf("qwen3", tmp_path / "hf")
    out = tmp_path / "out"
    command = ["train", "--hf-dir", str(tmp_path / "hf"), "--data", "x.jsonl", "--save", str(out)]

    def refusal(*flags: str) -> str:
        assert main([*command, *flags]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert (
        refusal("--load", "x")
        == f"train: --load does not go with --hf-dir, which sets it: its folders are in --save {out}"
    )
    (out / "start").mkdir(parents=True)
    assert refusal() == f"train: {out}/start is there without source.json, which says of which model it is: " + (
        "give another --save"
    )
    (out / "source.json").write_text("[]")
    assert refusal().startswith(f"train: {out} was begun with another model than {tmp_path / 'hf'} is now")
    (tmp_path / "file").touch()
    assert refusal("--save", str(tmp_path / "file")) == f"train: {tmp_path}/file is a file: --save needs a folder there"
    (tmp_path / "hf/config.json").unlink()
    assert refusal().startswith(f"train: cannot read {tmp_path / 'hf/config.json'}")
    monkeypatch.setenv("RANK", "0")
    assert "call it without torchrun" in refusal()
    assert sorted(path.name for path in out.iterdir()) == ["source.json", "start"]


def test_values_are_judged_before_a_model_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["longact"])
    make_hf("qwen3", tmp_path / "hf")
    (tmp_path / "data.jsonl").write_text("")

    def refusal(data: str, *flags: str) -> str:
        command = ["train", "--hf-dir", str(tmp_path / "hf"), "--data", str(tmp_path / data), *flags]
        assert main([*command, "--save", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert refusal("nowhere.jsonl").startswith(f"train: --data {tmp_path}/nowhere.jsonl: no such file")
    assert "--longact-ratio is 3.0" in refusal("data.jsonl", "--longact-ratio", "3")
    assert "--longact-ratio given without --longact" in refusal("data.jsonl", "--dense", "--longact-ratio", "0.3")
    assert "unknown reward 'kindness'" in refusal("data.jsonl", "--default-reward", "kindness")
    assert not (tmp_path / "out").exists()


def test_another_run_is_not_taken_for_the_one_that_is_there(tmp_path: Path) -> None:
    tracker, file = tmp_path / "checkpoints/latest_checkpointed_iteration.txt", tmp_path / "asked.json"

    def asked(*words: str) -> tuple[Namespace, list[str]]:
        return from_hf.parser().parse_known_args(["--hf-dir", "in", "--save", str(tmp_path), "--data", *words])

    def check(*words: str) -> None:
        from_hf._check_run(*asked(*words))

    run = ["a.jsonl", "--lr", "1e-5", "--train-iters", "3"]
    file.write_text(json.dumps(from_hf._asked(*asked(*run))))
    check("b.jsonl", "--dense")  # a run that has saved nothing
    tracker.parent.mkdir()
    tracker.write_text("3")
    check("a.jsonl", "--lr", "2e-5", "--train-iters", "9")  # on the way it may go on otherwise
    with pytest.raises(ValueError, match="holds a run with LongAct, which does not go on without it: give another"):
        check("a.jsonl", "--lr", "1e-5", "--dense")
    (tmp_path / "report.md").touch()
    check(*run, "--verbose")
    check("a.jsonl", "--longact", "--train-iters=3", "--lr=1e-5")  # the same
    check("b.jsonl", "--lr", "2e-5", "--train-iters", "4")  # it goes on
    check("b.jsonl", "--lr", "2e-5", "--train-iters", "3", "--overwrite")
    for other in (["a.jsonl", "--lr", "2e-5"], ["b.jsonl", "--lr", "1e-5"], ["a.jsonl", "--lr", "1e-5", "--longct"]):
        with pytest.raises(ValueError, match=r"holds a finished run of --data a\.jsonl --lr 1e-5, not of --data [ab]"):
            check(*other, "--train-iters", "3")
    begun = tmp_path / "asked.json.partial"  # of a run whose caller was killed
    begun.write_text(json.dumps(from_hf._asked(*asked("b.jsonl"))))
    os.utime(begun, (0, 0))
    with pytest.raises(ValueError, match=r"holds a finished run of --data b\.jsonl, not of --data a"):
        check(*run)
    os.utime(tracker, (0, 0))  # which saved nothing
    check(*run)


def test_a_start_is_of_a_known_model_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hf("qwen3", tmp_path / "hf")
    args = Namespace(hf_dir=tmp_path / "hf", save=tmp_path / "out")
    seen: list[bool] = []

    def stopped(words: list[str]) -> int:
        seen.append((args.save / "source.json").is_file())
        raise KeyboardInterrupt

    monkeypatch.setitem(from_hf._STEPS, "convert to-megatron", stopped)
    with pytest.raises(KeyboardInterrupt):
        from_hf._to_megatron(args, [])
    assert seen == [True]
    (args.save / "source.json").write_text("[]")  # of another one, of which there is nothing yet
    from_hf._check(args, [])
