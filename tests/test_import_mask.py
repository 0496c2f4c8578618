"""`--longact-import-mask`: a run that starts from given masks, at any layout; and masks that do not fit, by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_longact import LongAct, LongActConfig
from megatron_longact.imported_masks import mask_name, read_masks
from megatron_longact.qkv_layout import QKVLayout
from tests import ranks, runs
from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step
from tests.ranks import Layout

SPEC = ModelSpec(layers=2)
LAYOUT = QKVLayout(SPEC.heads, SPEC.groups, SPEC.kv_channels)
ROWS = {"q": LAYOUT.num_q_channels, "k": LAYOUT.num_k_channels}
NUMBERS = [1, 2]


def given_masks(layers: int = 2) -> dict[int, dict[str, torch.Tensor]]:
    """Masks that no selection would make: another share in every layer."""
    generator = torch.Generator().manual_seed(3)
    return {
        number: {part: torch.rand(rows, generator=generator) < 0.1 + 0.2 * number for part, rows in ROWS.items()}
        for number in range(1, layers + 1)
    }


def mask_file(path: Path, masks: dict[int, dict[str, torch.Tensor]] | None = None) -> Path:
    masks = given_masks() if masks is None else masks
    save_file({mask_name(n, f"{part}_proj"): mask for n, parts in masks.items() for part, mask in parts.items()}, path)
    return path


def same(a: dict[int, dict[str, torch.Tensor]], b: dict[int, dict[str, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][part], b[n][part]) for n in a for part in ROWS)


def train(path: Path, *, layout: Layout | None = None, world_size: int = 1, **config: Any) -> Any:
    settings = LongActConfig(import_mask=str(path), **config)
    optimizer = OptimizerSpec(distributed=world_size > 1)
    results = ranks.run(
        runs.train, layout=layout, world_size=world_size, spec=SPEC, optimizer=optimizer, config=settings, steps=4
    )
    assert all(same(a, b) for result in results for a, b in zip(result["masks"], results[0]["masks"], strict=True))
    return results[0]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [(Layout(), 1), (Layout(tp=2), 2), (Layout(pp=2), 2), (Layout(), 2)],
    ids=["one rank", "tp2", "pp2", "dp2"],
)
def test_with_interval_0_the_given_masks_stay(tmp_path: Path, layout: Layout, world_size: int) -> None:
    result = train(mask_file(tmp_path / "mask"), layout=layout, world_size=world_size, refresh_interval=0)
    assert all(same(masks, given_masks()) for masks in result["masks"])
    assert result["state"]["refreshes"] == 0
    for number, parts in given_masks().items():
        frozen = ~LAYOUT.fused(parts["q"], parts["k"], fill=True)
        name = f"decoder.layers.{number - 1}.self_attention.linear_qkv.weight"
        changed = (result["start"][name] != result["weights"][-1][name]).any(1)
        assert not changed[frozen].any()
        assert changed[~frozen].all()


def test_with_another_interval_they_hold_until_the_next_refresh(tmp_path: Path) -> None:
    result = train(mask_file(tmp_path / "mask"), refresh_interval=2)
    assert [same(masks, given_masks()) for masks in result["masks"]] == [True, True, False, False]
    assert same(result["masks"][2], result["masks"][3])
    assert result["state"]["refreshes"] == 1
    assert all(int(parts["q"].sum()) == 10 for parts in result["masks"][2].values())  # a selection of ours: 30 % of 32


def test_with_interval_1_they_are_those_of_the_first_step(tmp_path: Path) -> None:
    result = train(mask_file(tmp_path / "mask"))
    assert [same(masks, given_masks()) for masks in result["masks"]] == [True, False, False, False]


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_warm_up_comes_first(tmp_path: Path, ema: float) -> None:
    result = train(mask_file(tmp_path / "mask"), refresh_interval=2, warmup_steps=1, ema=ema)
    assert [bool(masks) and same(masks, given_masks()) for masks in result["masks"]] == [False, True, True, False]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert (result["start"][name] != result["weights"][0][name]).any(1).all()  # the dense step


def test_a_projection_that_is_no_target_trains_densely(tmp_path: Path) -> None:
    only_q = {number: {"q": parts["q"]} for number, parts in given_masks().items()}
    result = train(mask_file(tmp_path / "mask", only_q), refresh_interval=0, targets="q")
    for number, parts in result["masks"][-1].items():
        assert torch.equal(parts["q"], only_q[number]["q"])
        assert parts["k"].all()


def resume(*, state: dict[str, Any], config: LongActConfig) -> Any:
    built = build(SPEC)
    with LongAct.attach(built.chunks, built.optimizer, config) as longact:
        longact.load_state_dict(state)
        assert train_step(built, random_tokens(2, 32), before_forward=runs.name_all(longact))[0]
        return runs.cpu(longact.masks)


def test_a_run_that_resumes_goes_on_with_its_own_masks(tmp_path: Path) -> None:
    config = LongActConfig(refresh_interval=0)
    selected = ranks.run(runs.train, spec=SPEC, config=config, steps=1)[0]
    path = mask_file(tmp_path / "mask")
    with_file = replace(config, import_mask=str(path))
    assert same(ranks.run(resume, state=selected["state"], config=with_file)[0], selected["masks"][-1])
    imported = train(path, refresh_interval=0)["state"]
    path.unlink()
    assert same(ranks.run(resume, state=imported, config=config)[0], given_masks())


def refused(path: Path, **changes: Any) -> str:
    layout = replace(LAYOUT, **changes)
    with pytest.raises(ValueError, match=r"--longact-import-mask|no safetensors|truncated") as error:
        read_masks(path, layout, NUMBERS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask"
    assert "no such file" in refused(path)
    path.write_bytes(b"no tensors here, but some text")
    assert str(path) in refused(path)
    mask_file(path, given_masks(1))
    message = refused(path)
    assert "model.layers.1.self_attn.q_proj" in message
    assert "model.layers.1.self_attn.k_proj" in message
    mask_file(path, given_masks(3))
    assert "model.layers.2.self_attn.k_proj" in refused(path)
    mask_file(path)
    assert "bool [32]" in refused(path, kv_channels=16)
    masks = given_masks()
    mask_file(path, {n: {part: mask.float() for part, mask in parts.items()} for n, parts in masks.items()})
    assert "float32 [32], this model has bool [32]" in refused(path)


def test_shapes_of_what_is_read(tmp_path: Path) -> None:
    masks = read_masks(mask_file(tmp_path / "mask"), LAYOUT, NUMBERS)
    assert masks.q.shape == (2, 32)
    assert masks.k.shape == (2, 16)
    assert torch.equal(masks.k[1], given_masks()[2]["k"])
