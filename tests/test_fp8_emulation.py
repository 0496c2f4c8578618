"""FP8 without a GPU: what the recipes keep of a tensor, against plain loops; a model that is itself again after it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_longact.analysis.activations.hf import open_folder
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.fp8 import report
from megatron_longact.analysis.fp8.emulation import _fused_places, _groups, emulated
from megatron_longact.analysis.fp8.formats import MOST, RECIPES, quantize_input, quantize_weight
from tests.conversion import make_hf

GENERATOR = torch.Generator().manual_seed(3)


def outliers(rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, generator=GENERATOR)
    x[1, 2], x[-1] = 300.0, 0.0
    return x


def nearest_e4m3(value: float) -> float:
    """Three bits behind the leading one, exponents from -6 on, to even at a tie."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3)
    return math.copysign(min(round(abs(value) / step) * step, MOST), value)


def in_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    kept = x.clone()
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            block = x[r : r + rows, c : c + columns]
            amax = float(block.abs().max())
            scale = 2.0 ** math.floor(math.log2(MOST / amax)) if amax else 1.0
            for i, j in torch.cartesian_prod(*map(torch.arange, block.shape)).tolist():
                kept[r + i, c + j] = nearest_e4m3(float(block[i, j]) * scale) / scale
    return kept


@pytest.mark.parametrize(
    ("recipe", "of_input", "of_weight"), [("blockwise", (1, 128), (128, 128)), ("mxfp8", (1, 32), (1, 32))]
)
def test_blocks_have_scales_of_their_own(recipe, of_input, of_weight) -> None:
    x = outliers(5, 140)
    assert torch.equal(quantize_input(x, recipe), in_blocks(x, *of_input))
    weight = outliers(130, 40)
    assert torch.equal(quantize_weight(weight, recipe), in_blocks(weight, *of_weight))


def test_a_tensor_has_one_scale_and_delayed_cuts_off_what_is_larger_than_before() -> None:
    x = outliers(5, 140)
    scale = MOST / x.abs().max()
    wanted = torch.tensor([nearest_e4m3(float(value)) for value in (x * scale).flatten()]).view_as(x) / scale
    assert torch.equal(quantize_input(x, "tensorwise"), wanted)
    assert torch.equal(quantize_weight(x, "delayed"), wanted)
    assert quantize_input(x, "delayed", amax=100.0)[1, 2] == 100.0
    assert quantize_input(x, "delayed")[1, 2] == 288.0  # of nothing before: as they are
    assert torch.equal(quantize_input(x, "bf16"), x.bfloat16().float())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "llama3"
    make_hf("llama3", path)
    return path


def test_fused_weights_are_quantised_together_and_come_back_to_the_bit(folder: Path) -> None:
    source = open_folder(folder)
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    prompts = [[1, 2, 3, 4, 5, 6, 7]]
    plain = source.measure(prompts).scores["projection", "mean-abs"]
    attention, layout = source.attentions[0], source.layout
    whole = torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]).float()
    fused = whole[_fused_places(layout).argsort()]
    hn = layout.kv_channels
    first_group = torch.cat([whole[: layout.heads_per_group * hn], attention.k_proj.weight[:hn].float()])
    assert torch.equal(fused[: len(first_group)], first_group)
    for recipe in RECIPES:
        with emulated(source, recipe):
            assert torch.equal(
                attention.k_proj.weight[:hn].float(),
                quantize_weight(fused, recipe)[len(first_group) - hn : len(first_group)],
            )
            changed = source.measure(prompts).scores["projection", "mean-abs"]
        assert not torch.equal(changed.q, plain.q)
        torch.testing.assert_close(changed.q, plain.q, rtol=0.5, atol=0.05)
        assert all(torch.equal(tensor, before[name]) for name, tensor in source.model.state_dict().items())
        assert torch.equal(source.measure(prompts).scores["projection", "mean-abs"].q, plain.q)
    linears = [part for parts, _ in _groups(source, "all") for part in parts]
    assert len(linears) == len(set(linears)) == 7 * len(source.attentions)
    assert len(list(_groups(source, "qkv"))) == len(source.attentions)


def test_the_report_has_a_line_a_recipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, said = open_folder(folder), io.StringIO()
    monkeypatch.setattr(PromptOptions, "prompts", lambda *_, **__: [[1, 2, 3, 4, 5, 6, 7, 8]])
    options = PromptOptions(tasks=("niah_single_1",), lengths=(8,), num_samples=1, apply_chat_template=False)
    report.run(source, options, ratio=0.3, linears="qkv", output=tmp_path, terminal=said)
    written = json.loads((tmp_path / report.RESULTS).read_text())
    assert [row["recipe"] for row in written["recipes"]] == list(RECIPES[1:])
    assert all(0 < row["k"]["overlap"] <= 1 and len(row["q"]["by_layer"]) == 2 for row in written["recipes"])
    assert "mxfp8" in said.getvalue()
    assert "an emulation" in said.getvalue()
