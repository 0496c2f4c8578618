"""tools/stability.py: overlap and chance on paper, what is said of them, and both kinds of model end to end."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact.analysis.activations.measurement import Measurement
from megatron_longact.analysis.stability.masks import read_choices
from megatron_longact.analysis.stability.movement import movement, with_hysteresis
from megatron_longact.analysis.stability.movement import report as movement_report
from megatron_longact.analysis.stability.overlap import CARRIES, STABLE, Choice, jaccard, overlap, verdict
from megatron_longact.analysis.stability.plots import movement_figure
from megatron_longact.analysis.stability.report import Survey, _of_runs, drawn
from megatron_longact.config import LongActConfig
from megatron_longact.conversion import to_megatron
from megatron_longact.conversion.torch_dist import COMMON, TorchDistWriter
from megatron_longact.mask_history import MaskHistory
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.safetensors_files import SafetensorsWriter
from megatron_longact.selection import QK, select_masks, select_salient_channels
from tests.ranks import run_program
from tests.test_observe import ROOT, load_tool
from tests.tokenizers import SENTENCEPIECE

pytestmark = pytest.mark.timeout(200)


def mask(*chosen: int, of: int = 10) -> Tensor:
    rows = torch.zeros(1, of, dtype=torch.bool)
    rows[0, list(chosen)] = True
    return rows


def test_overlap_on_paper() -> None:
    scores = torch.arange(10.0)[None] + 1  # 1 to 10
    a = Choice("a", QK(mask(7, 8, 9), mask(8, 9)), QK(scores, scores))
    b = Choice("b", QK(mask(6, 8, 9), mask(0, 1)), QK(scores, scores))
    compared = overlap("tasks", [a, b], [4])
    assert compared.jaccard.tolist() == [[1.0, 2 / 8], [2 / 8, 1.0]]  # 2 + 0 rows in both, 4 + 4 in either
    assert compared.layers.tolist() == [[0.5], [0.0]]
    assert compared.worst == (0.25, "a and b")
    common = 3 * 3 / 10 + 2 * 2 / 10
    assert compared.chance[0, 1].item() == pytest.approx(common / (10 - common))
    assert compared.carried is not None
    assert compared.carried[0, 1].item() == pytest.approx(((8 + 9 + 10) / (7 + 9 + 10) + (9 + 10) / (1 + 2)) / 2)
    assert compared.carried.diag().tolist() == [1.0, 1.0]
    assert compared.layer_numbers == (4,)


def test_chance_is_what_random_masks_have() -> None:
    """Within 0.01: two hundred draws of 2 x 77 of 256 rows have a standard error of 0.001."""
    torch.manual_seed(0)
    masks = [QK(*(select_salient_channels(torch.rand(3, size), ratio=0.3) for size in (256, 128))) for _ in range(20)]
    compared = overlap("tasks", [Choice(str(i), each) for i, each in enumerate(masks)], [1, 2, 3])
    assert compared.mean == pytest.approx(compared.mean_chance, abs=0.01)
    assert compared.mean_chance == pytest.approx(0.3 / 1.7, abs=0.003)
    assert compared.carried is None


def test_masks_of_other_models_are_refused() -> None:
    one, other = (Choice(name, QK(mask(1, of=n), mask(1))) for name, n in (("one", 10), ("other", 12)))
    with pytest.raises(ValueError, match="one, other are not of one shape"):
        overlap("checkpoints", [one, other], [1])


def test_masks_one_after_another_on_paper() -> None:
    sets = [(0, 1), (0, 2), (0, 1), (0, 3), (0, 3)]
    choices = [Choice(str(i), QK(mask(*chosen), mask(9))) for i, chosen in enumerate(sets)]
    moved = movement("seeds", choices)
    assert moved.with_before == (0.5, 0.5, 0.5, 1.0)  # 0 and the row of K in both, two more in either
    assert moved.with_first == (0.5, 1.0, 0.5, 0.5)
    assert moved.ever == (3 / 20, 4 / 20, 4 / 20, 5 / 20, 5 / 20)
    assert (moved.came_back_at_once, moved.came_back) == (1 / 3, 1 / 3)  # 1 does; 2 and 1 leave for good
    history = MaskHistory(first=QK(mask(8, 9), mask(9)), last_active=QK(torch.ones(1, 10).int(), mask(9).int()))
    known = movement("a run", [replace(choice, history=history) for choice in choices])
    assert known.with_first == (1 / 5, 1 / 5, 1 / 5, 1 / 5)  # that of the run, whose checkpoint is not among these
    assert known.ever == (11 / 20,) * 5
    assert movement("a run", choices[3:]).came_back is None


def test_what_hysteresis_would_make_of_the_same_scores() -> None:
    layout, config = QKVLayout(1, 1, 10), LongActConfig(ratio=0.4)
    base = torch.arange(10.0)[None]
    swapped = base.clone()
    swapped[0, [5, 6]] = torch.tensor([6.0, 5.0])  # the last that is selected, and the first that is not
    scores = [base, swapped, base, swapped]
    choices = [
        Choice(str(i), select_masks(QK(each, each), layout=layout, config=config), QK(each, each))
        for i, each in enumerate(scores)
    ]
    off, on = with_hysteresis("seeds", choices, layout=layout, config=config, margins=(0.0, 0.25))
    assert (off.with_before, off.came_back_at_once, off.carried) == ((0.6,) * 3, 1.0, 1.0)
    assert (on.with_before, on.came_back_at_once) == ((1.0,) * 3, None)
    assert on.carried == pytest.approx((1 + 29 / 30) / 2)  # 5 in place of 6, in two of four masks
    assert [line.split()[:3] for line in movement_report([off, on]).splitlines()[1:]] == [
        ["seeds", "4", "0"],
        ["seeds", "4", "0.25"],
    ]


def test_mixed_sets_have_as_many_prompts_each_of_a_task_that_is_drawn() -> None:
    draws = [drawn(("a", "b", "c"), 2, seed=seed) for seed in range(30)]
    assert all(sum(each.values()) == 6 and 0 not in each.values() for each in draws)
    assert draws[0] == drawn(("a", "b", "c"), 2, seed=0)
    assert len({tuple(each.items()) for each in draws}) > 5


def test_jaccard_of_nothing_is_one() -> None:
    assert jaccard(mask(), mask()) == 1.0


@pytest.mark.parametrize(
    ("second", "scores", "said"),
    [
        (mask(1, 2, 3, 4, 5, 6, 7, 8, 9, of=20), None, "would do over seeds"),  # 8 of 9
        (mask(1, 2, 3, 4, 9, 10, 11, 12, of=20), torch.ones(1, 20), "would nearly do"),
        (mask(1, 2, 3, 4, 5, 9, 10, 11, of=20), 2.0 ** -torch.arange(20.0)[None], "would nearly do"),
        (mask(11, 12, 13, 14, 15, 16, 17, 18, of=20), 2.0 ** -torch.arange(20.0)[None], "would not do"),
        (mask(1, 2, 3, 4, 9, 10, 11, 12, of=20), None, "would not do"),
    ],
)
def test_the_verdict_depends_on_overlap_and_on_what_is_carried(
    second: Tensor, scores: Tensor | None, said: str
) -> None:
    first = mask(1, 2, 3, 4, 5, 6, 7, 8, of=20)
    both = [None if scores is None else QK(scores, scores)] * 2
    choices = [Choice(n, QK(m, m), s) for n, m, s in zip(("a", "b"), (first, second), both, strict=True)]
    words = verdict([overlap("seeds", choices, [1])])
    assert f"a mask chosen once {said}" in words
    assert "seeds: a and b" in words
    assert (STABLE, CARRIES) == (0.8, 0.95)


def test_the_verdict_says_over_what_a_mask_would_hold() -> None:
    first, same, other = (Choice(str(i), QK(m, m)) for i, m in enumerate((mask(1, 2), mask(1, 2), mask(7, 8))))
    words = verdict([overlap("tasks", [first, other], [1]), overlap("seeds", [first, same], [1])])
    assert words.startswith("a mask chosen once would not do over tasks, but over seeds: the lowest overlap is 0.00")


def write_masks(path: Path, masks: dict[str, Tensor]) -> Path:
    with SafetensorsWriter(path, {name: (m.dtype, tuple(m.shape)) for name, m in masks.items()}) as writer:
        for name, m in masks.items():
            writer.write(name, m)
    return path


def mask_file(path: Path, *chosen: int) -> Path:
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qk"]
    return write_masks(path, {name: mask(*chosen)[0] for name in names})


def test_masks_of_files_are_compared_alone(tmp_path: Path, capsys: Any) -> None:
    files = [mask_file(tmp_path / "early.safetensors", 1, 2, 3), mask_file(tmp_path / "late.safetensors", 1, 2, 4)]
    output = tmp_path / "out"
    assert run_tool("--masks", *files, "--output", output, "--html", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 2
    assert '<th scope="row">runs&#39; own masks</th><td>2</td>' in page
    results = json.loads((output / "stability.json").read_text())
    axis = results["axes"]["runs' own masks"]
    assert axis["names"] == ["early", "late"]
    assert axis["jaccard"][0] == [1.0, 0.5]
    assert axis["by_layer"] == {"layers": [0, 1], "layers_counted_from": 0, "q": [0.5, 0.5], "k": [0.5, 0.5]}
    assert "would not do" in capsys.readouterr().out
    assert {path.name for path in output.glob("*.png")} == {"matrices.png", "curves.png"}


def test_one_mask_is_compared_with_what_the_model_chooses(tmp_path: Path) -> None:
    layout = QKVLayout(num_attention_heads=2, num_query_groups=1, kv_channels=4)
    scores = QK(torch.arange(8.0)[None], torch.arange(4.0)[None])
    measured = Measurement(1, (0,), {("projection", "mean-abs"): scores})
    survey = Survey(LongActConfig(ratio=0.5), layout, (0,), checkpoints={"model 7": measured})
    parts = {"q": mask(4, 5, 6, 3)[0][:8], "k": mask(2, 3)[0][:4]}
    file = write_masks(tmp_path / "one.safetensors", {f"model.layers.0.self_attn.{p}_proj": parts[p] for p in "qk"})
    [found], moved = _of_runs([file], survey.own())
    assert moved == []
    assert found.names == ("model 7", "one")
    assert found.layers.tolist() == [[3 / 5], [1.0]]  # 4, 5, 6 of 3 to 7; both of K


def test_masks_of_a_run_are_read_out_of_its_checkpoints(tmp_path: Path) -> None:
    """Checkpoints as Megatron's common state is read: with a mask, and before the first one."""
    masks = {part: torch.stack([mask(1, 2)[0], mask(3, 4)[0]]) for part in ("q", "k")}
    moving = {part: [masks[part].roll(i, 1) for i in range(3)] for part in ("q", "k")}
    of = {40 + i: {part: moving[part][i] for part in ("q", "k")} for i in range(3)}
    for iteration, made in ((1, None), *of.items()):
        folder = tmp_path / "run" / "checkpoints" / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        state = {"opt_param_scheduler": {"longact": {"masks": made, "layer_numbers": [1, 2]}}}
        writer = TorchDistWriter(folder)
        writer.write_file("__0_0", iter(()), objects={COMMON: state})
        writer.finish()
    checkpoints = tmp_path / "run" / "checkpoints"
    choices, layers = read_choices([checkpoints])
    assert [choice.name for choice in choices] == ["run 40", "run 41", "run 42"]
    _, [moved] = _of_runs([checkpoints], [])
    assert (moved.axis, moved.with_before, moved.with_first) == ("masks of run", (1 / 3,) * 2, (1 / 3, 0))
    assert moved.ever == (0.2, 0.3, 0.4)
    overlaps, rows = movement_figure(moved).axes
    assert [len(line.get_xdata()) for line in overlaps.lines] == [2, 2]  # the first mask has none before it
    assert [len(line.get_xdata()) for line in rows.lines] == [3]
    assert layers == (0, 1)
    assert torch.equal(choices[0].masks.k, masks["k"])
    other = tmp_path / "other" / "run"
    shutil.copytree(tmp_path / "run", other)
    _, moved_of_each = _of_runs([checkpoints, other / "checkpoints"], [])  # one name, two runs
    assert [each.axis for each in moved_of_each] == [f"masks of {tmp_path.name}/run", "masks of other/run"]
    assert all(each.with_before == (1 / 3,) * 2 for each in moved_of_each)


def run_tool(*arguments: str | Path) -> int:
    status: int = load_tool("stability").main([str(argument) for argument in arguments])
    return status


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --hf-dir DIR or --load DIR"),
        (["--masks", "nothing"], "nothing holds no Megatron checkpoint"),
        (["--masks", "FILE"], "--masks holds one mask, one: give another one, or a model"),
        (["--hf-dir", "nowhere", "--num-seeds", "0"], "--num-seeds is 0"),
        (["--hf-dir", "nowhere", "--ratio", "1.5"], "--ratio is 1.5; it must be a share"),
        (["--hf-dir", "nowhere", "--device", "foo"], "--device foo cannot be used here: Expected one of cpu"),
        (["--hf-dir", "nowhere", "--ckpt-step", "3"], "--ckpt-step goes with --load, not with --hf-dir"),
        (["--load", "nowhere", "--use-checkpoint-args"], "nowhere holds no Megatron checkpoint"),
        (["--load", "nowhere"], "nowhere holds no Megatron checkpoint"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    file = str(mask_file(tmp_path / "one.safetensors", 1, 2, 3))
    given = [file if argument == "FILE" else argument for argument in arguments]
    assert run_tool(*given, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("stability: ")
    assert error.count("\n") == 1
    assert said in error


def two_models(folder: Path) -> None:
    """Models a and b: a Qwen3 and the same with other K projections, in both formats."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "qwen3",
        num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=1024, max_position_embeddings=512, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("a", "b"):
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.k_proj.weight.mul_(torch.rand(64, 1) * 3)
        model.save_pretrained(folder / name)
        with redirect_stdout(io.StringIO()):
            to_megatron.convert(folder / name, folder / f"{name}-megatron")


def test_a_folder_and_its_megatron_checkpoint_give_the_same_overlaps(tmp_path: Path) -> None:
    """Both checkpoints go through Megatron's `load_checkpoint`, one after the other, in one model."""
    two_models(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "method.md").read_text())
    common = ["--prompts", text, "--lengths", "64", "256", "--num-samples", "3", "--num-seeds", "2"]
    folders = [tmp_path / "a", tmp_path / "b"]
    status = run_tool("--hf-dir", *folders, "--tokenizer", SENTENCEPIECE, *common, "--output", tmp_path / "hf")
    assert status == 0
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": "a prompt " * n}) + "\n" for n in (9, 12, 15)))
    prompts = ["--prompts", few, "--num-samples", "3", "--num-seeds", "2", "--output", tmp_path / "few"]
    assert run_tool("--hf-dir", *folders, "--tokenizer", SENTENCEPIECE, *prompts) == 0
    assert "seeds" not in json.loads((tmp_path / "few/stability.json").read_text())["axes"]  # all draw the same three
    flags = ["--use-checkpoint-args", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    loads = [str(tmp_path / "a-megatron"), str(tmp_path / "b-megatron")]
    given = ["--load", *loads, *flags, str(SENTENCEPIECE), *map(str, common), "--output", str(tmp_path / "megatron")]
    result = run_program("tools/stability.py", *given, launcher=False)
    assert result.returncode == 0, result.stderr[-3000:]
    hf, megatron = (json.loads((tmp_path / n / "stability.json").read_text())["axes"] for n in ("hf", "megatron"))
    assert set(hf) == set(megatron) == {"context lengths", "seeds", "checkpoints", "statistics and taps"}
    for axis, ours in hf.items():
        # one row of a hundred at the border, chosen by the last bit, changes the overlap by about 0.01
        got, wanted = (torch.tensor(each[axis]["jaccard"]) for each in (megatron, hf))
        assert got.allclose(wanted, rtol=0, atol=0.025), axis
        assert torch.tensor(ours["carried"]).diag().allclose(torch.tensor(1.0))
    checkpoints = torch.tensor(hf["checkpoints"]["by_layer"]["k"])
    assert checkpoints[0] < 0.8  # K was changed
    assert hf["checkpoints"]["by_layer"]["q"][0] == 1.0  # Q of the first layer was not
    assert megatron["checkpoints"]["names"] == ["a-megatron release", "b-megatron release"]
