"""What an audit counts, against folders whose every change is known."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_longact.conversion.audit import Change, audit
from tests.conversion import make_hf
from tests.ranks import run_program

TOOL = Path(__file__).parent.parent / "tools" / "audit_update.py"
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same bf16 weights."""
    for name in ("a", "b"):
        make_hf("qwen3", tmp_path / name, dtype=torch.bfloat16, shard_size="1GB")
    return tmp_path / "a", tmp_path / "b"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mask_file(path: Path, rows: list[int], name: str = Q, size: int = 64) -> Path:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[rows] = True
    save_file({name: mask, f"{name}.saliency": torch.rand(size)}, path)
    return path


def by_name(a: Path, b: Path, mask: Path | None = None) -> dict[str, Change]:
    return {change.name: change for change in audit(a, b, mask=mask).changes}


def test_nothing_changed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    changes = by_name(*folders, mask_file(tmp_path / "mask", [0, 1]))
    assert len(changes) == 2 * 11 + 3
    assert all(c.rows_changed == c.elements_changed == 0 and c.change_norm == 0 for c in changes.values())
    q = changes[f"{Q}.weight"]
    assert (q.masked, q.rows, q.rows_in_mask, q.changed_inside, q.changed_outside) == (True, 64, 2, 0, 0)
    assert changes["model.norm.weight"].changed_outside is None


def test_without_a_mask_nothing_is_said_of_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    edit(folders[1], lambda tensors: tensors[f"{Q}.weight"][3].add_(1))
    last = audit(*folders).table().splitlines()[-1]
    assert last == f"1 of {len(by_name(*folders))} tensors changed; no mask was given to hold them against"
    mask = mask_file(tmp_path / "mask", [3])
    assert "inside the mask: 1, outside: 0" in audit(*folders, mask=mask).table().splitlines()[-1]


def test_rows_inside_and_outside_are_told_apart(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[f"{Q}.weight"]
        weight[3] += 1.0
        weight[5, 7] = weight[5, 7].neg() - 1
        weight[9, 0] += 2.0
        tensors["model.norm.weight"][:4] += 1.0

    edit(folders[1], change)
    mask = mask_file(tmp_path / "mask", [3, 5, 60])
    changes = by_name(*folders, mask)
    q = changes[f"{Q}.weight"]
    assert (q.rows_changed, q.changed_inside, q.changed_outside, q.rows_in_mask) == (3, 2, 1, 3)
    assert (q.elements_changed, q.elements_changed_inside) == (32 + 2, 32 + 1)
    before, after = (load_file(folder / "model.safetensors")[f"{Q}.weight"].double() for folder in folders)
    size = float((after - before).norm())
    assert q.change_norm == pytest.approx(size, rel=1e-12)
    assert q.relative_change == pytest.approx(size / float(before.norm()), rel=1e-12)
    norm = changes["model.norm.weight"]
    assert (norm.rows_changed, norm.masked, norm.changed_inside) == (4, False, None)
    assert q.share_of_change == pytest.approx(size**2 / (size**2 + norm.change_norm**2), rel=1e-12)
    result = audit(*folders, mask=mask)
    assert (result.changed_inside, result.changed_outside) == (2, 1)
    assert result.elements_inside_and_outside == (33 / (3 * 32), 1 / (61 * 32))


def test_a_bit_is_a_change(folders: tuple[Path, Path]) -> None:
    def negative_zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"][4, 0] = -0.0

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight"][4, 0] = 0.0

    edit(folders[0], zero)
    edit(folders[1], negative_zero)
    change = by_name(*folders)[f"{Q}.weight"]
    assert (change.rows_changed, change.change_norm) == (1, 0.0)


def test_large_tensors_are_read_in_blocks(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folders[1], lambda tensors: tensors[f"{Q}.weight"][::2].add_(1.0))
    whole = by_name(*folders)
    monkeypatch.setattr("megatron_longact.conversion.audit._BLOCK_BYTES", 200)
    in_blocks = by_name(*folders)
    for name, change in whole.items():
        assert in_blocks[name].rows_changed == change.rows_changed
        assert in_blocks[name].change_norm == pytest.approx(change.change_norm, rel=1e-12)
    assert whole[f"{Q}.weight"].rows_changed == 32


def test_tool_prints_a_table_and_writes_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    edit(folders[1], lambda tensors: tensors[f"{Q}.weight"][3].add_(1.0))
    mask = mask_file(tmp_path / "mask", [3])
    command = [TOOL, *folders, "--mask", mask, "--json", tmp_path / "audit.json"]
    result = run_program(*map(str, command), launcher=False, cpu=False)
    assert result.returncode == 0, result.stderr
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith(f"{Q}.weight"))
    assert row[1:6] == ["64", "1", "1", "1", "0"]
    assert "inside the mask: 1, outside: 0" in result.stdout
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["tensors"][f"{Q}.weight"]["changed_inside"] == 1
    assert written["tensors"][f"{Q}.weight"]["changed_outside"] == 0
    assert written["total"]["rows_changed"] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is in"),
        (lambda tensors: tensors.update({"extra": torch.zeros(1)}), "extra is in"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight is [32]"),
        (lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}), "torch.float16"),
    ],
)
def test_folders_of_other_models_are_refused(
    folders: tuple[Path, Path], change: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    edit(folders[1], change)
    with pytest.raises(ValueError, match=r"\S") as error:
        audit(*folders)
    assert named in str(error.value)


def test_masks_that_do_not_fit_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, size, named in (
        ("model.layers.7.self_attn.q_proj", 64, "no model.layers.7.self_attn.q_proj.weight"),
        (Q, 63, "has shape [63]"),
    ):
        with pytest.raises(ValueError, match=r"\S") as error:
            audit(*folders, mask=mask_file(tmp_path / "mask", [0], name, size))
        assert named in str(error.value)
    save_file({"x": torch.zeros(2)}, tmp_path / "mask")
    with pytest.raises(ValueError, match="holds no mask"):
        audit(*folders, mask=tmp_path / "mask")
