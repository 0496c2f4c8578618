"""LongAct's state in Megatron's checkpoints: resume is bitwise, also at another layout. Real runs, real files."""

import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_longact.megatron import checkpointing
from megatron_longact.megatron.checkpointing import check_model_shape, mend_tracker
from tests.ranks import run_program
from tests.test_run import PROGRAMS, TRAINING

pytestmark = pytest.mark.timeout(400)

LONGACT = ["--longact", "--longact-ema", "0.5", "--longact-refresh-interval", "2", "--longact-hysteresis", "0.2"]
MODEL = ["--num-layers", "4", "--bf16", "--ckpt-format", "torch_dist", "--dist-ckpt-optim-fully-reshardable"]
VOCAB = 65
"""Tokens of the tokenizer; how far the vocabulary is padded depends on the tensor-parallel size."""
OVERLAPPED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def run(
    folder: Path,
    iteration: int,
    *flags: str,
    ranks: int = 2,
    tp: int = 2,
    load: Path | None = None,
    program: str = "pretrain_lean.py",
) -> subprocess.CompletedProcess[str]:
    """Train up to an iteration and save there; `load` goes on from another folder's checkpoint."""
    given = ["--train-iters", "100", "--exit-interval", str(iteration), "--save", str(folder), "--save-interval", "2"]
    given += ["--load", str(load or folder), "--tensor-model-parallel-size", str(tp)]
    return run_program(str(PROGRAMS / program), *TRAINING, *MODEL, *given, *flags, world_size=ranks)


def done(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def read(folder: Path, iteration: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The common state, and every tensor, of a torch_dist checkpoint."""
    path = folder / f"iter_{iteration:07d}"
    tensors: dict[str, Any] = {}
    _load_state_dict(tensors, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return load_common_state_dict(path), tensors


def assert_bitwise(a: Any, b: Any, where: str = "") -> None:
    """Equal structure, values, and bits of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif not hasattr(a, "read"):
        assert a == b, where


def weights_and_moments(tensors: dict[str, Any]) -> dict[str, Any]:
    assert {"decoder.layers.self_attention.linear_qkv.weight"} <= tensors.keys()
    assert any("exp_avg_sq" in name for name in tensors)
    tensors = {k: v[:VOCAB] if "word_embeddings" in k or "output_layer" in k else v for k, v in tensors.items()}
    return {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor) and "rng" not in k and "rerun" not in k}


def longact_of(folder: Path, iteration: int) -> dict[str, Any]:
    state: dict[str, Any] = read(folder, iteration)[0]["opt_param_scheduler"]["longact"]
    return state


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations, saved after two and at the end; TP 2 × DP 2, overlapped."""
    folder = tmp_path_factory.mktemp("trained")
    done(run(folder, 4, *LONGACT, *OVERLAPPED, ranks=4))
    return folder


def test_state_is_in_the_checkpoint(trained: Path) -> None:
    state = longact_of(trained, 4)
    assert state["updates"] == 4
    assert state["refreshes"] == 2
    assert state["layer_numbers"] == [1, 2, 3, 4]
    assert state["masks"]["q"].shape == (4, 32)
    assert state["masks"]["q"].sum(1).tolist() == [10] * 4
    assert state["saliency"]["k"].dtype == torch.float32
    early = longact_of(trained, 2)
    assert torch.equal(state["history"]["first"]["q"], early["masks"]["q"])
    ever = early["masks"]["q"] | state["masks"]["q"]
    assert torch.equal(state["history"]["last_active"]["q"], torch.where(state["masks"]["q"], 4, 2 * ever).int())


def test_resume_is_bitwise(trained: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "iter_0000002").symlink_to(trained / "iter_0000002")
    (half / "latest_checkpointed_iteration.txt").write_text("2")
    result = done(run(tmp_path / "resumed", 4, *LONGACT, *OVERLAPPED, ranks=4, load=half))
    assert "LongAct goes on at update 2" in result.stdout
    (wanted_common, wanted), (common, tensors) = read(trained, 4), read(tmp_path / "resumed", 4)
    assert_bitwise(common["opt_param_scheduler"], wanted_common["opt_param_scheduler"])
    assert_bitwise(weights_and_moments(tensors), weights_and_moments(wanted))


LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "tp1": (1, 1, []),
    "tp4": (4, 4, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "tp2 pp2": (4, 2, ["--pipeline-model-parallel-size", "2"]),
    "tp2 dp1": (2, 2, []),
    "dp2": (2, 1, []),
}
"""Ranks, tensor-parallel size, further flags; each loads what the one before saved."""


def test_other_layouts_keep_every_bit(trained: Path, tmp_path: Path) -> None:
    source, (old_common, old) = trained, read(trained, 4)
    for name, (ranks, tp, flags) in LAYOUTS.items():
        # Megatron's own conversion loads, saves again, and ends before any training
        convert = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", str(tmp_path / name)]
        flags = [*LONGACT, "--use-distributed-optimizer", *flags, *convert]
        done(run(tmp_path / "unused", 100, *flags, ranks=ranks, tp=tp, load=source))
        source = tmp_path / name / "torch_dist"
        new_common, new = read(source, 4)
        assert_bitwise(new_common["opt_param_scheduler"]["longact"], old_common["opt_param_scheduler"]["longact"], name)
        assert_bitwise(weights_and_moments(new), weights_and_moments(old), name)


def test_an_asynchronous_save_holds_the_state_of_its_iteration(trained: Path, tmp_path: Path) -> None:
    done(run(tmp_path, 4, *LONGACT, *OVERLAPPED, "--async-save", ranks=4))
    for iteration in (2, 4):
        (wanted_common, wanted), (common, tensors) = read(trained, iteration), read(tmp_path, iteration)
        assert_bitwise(common["opt_param_scheduler"], wanted_common["opt_param_scheduler"])
        assert_bitwise(weights_and_moments(tensors), weights_and_moments(wanted))


def test_another_layout_trains_on(trained: Path, tmp_path: Path) -> None:
    flags = [*LONGACT, "--use-distributed-optimizer"]
    result = done(run(tmp_path / "on", 6, *flags, ranks=1, tp=1, load=trained, program="pretrain_plain.py"))
    assert "LongAct goes on at update 4" in result.stdout
    before, after = longact_of(trained, 4), longact_of(tmp_path / "on", 6)
    assert after["updates"] == 6
    assert after["refreshes"] == before["refreshes"] + 1
    assert not torch.equal(after["saliency"]["q"], before["saliency"]["q"])


def test_checkpoint_without_the_state_starts_fresh(tmp_path: Path) -> None:
    done(run(tmp_path / "dense", 2))
    result = done(run(tmp_path / "with", 4, *LONGACT, load=tmp_path / "dense"))
    assert "LongAct starts fresh" in result.stdout
    assert longact_of(tmp_path / "with", 4)["updates"] == 2
    result = done(run(tmp_path / "without", 6, load=tmp_path / "with"))
    assert "the checkpoint was trained with LongAct, and this run goes on without it" in result.stdout + result.stderr


def test_finetune_starts_fresh(trained: Path, tmp_path: Path) -> None:
    result = done(run(tmp_path / "tuned", 2, *LONGACT, "--finetune", load=trained))
    assert "LongAct starts fresh" in result.stdout
    assert longact_of(tmp_path / "tuned", 2)["updates"] == 2


def test_a_tracker_that_a_kill_cut_off_is_mended(trained: Path, tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("")
    with pytest.raises(ValueError, match="no complete checkpoint lies beside it"):
        mend_tracker(str(tmp_path))
    (tmp_path / "iter_0000004").symlink_to(trained / "iter_0000004")
    (tmp_path / "iter_0000006").mkdir()  # one that was not finished
    result = done(run(tmp_path, 6, *LONGACT, *OVERLAPPED))
    assert "a run was killed while it wrote it; it names iter_0000004 now" in result.stdout
    assert "LongAct goes on at update 4" in result.stdout
    assert tracker.read_text() == "6"
    mend_tracker(str(tmp_path))
    assert tracker.read_text() == "6"


def test_a_model_without_groups_has_as_many_as_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Namespace(num_attention_heads=4, num_query_groups=4, group_query_attention=False)
    monkeypatch.setattr(checkpointing, "saved_args", lambda folder, step: saved if folder else None)
    check_model_shape(Namespace(load="there", num_attention_heads=4, num_query_groups=1, group_query_attention=False))
    with pytest.raises(ValueError, match="num_query_groups 4 there, 2 here"):
        check_model_shape(
            Namespace(load="there", num_attention_heads=4, num_query_groups=2, group_query_attention=True)
        )


def test_another_model_shape_is_refused_in_one_line(trained: Path) -> None:
    for flag, value in (("--hidden-size", 48), ("--num-query-groups", 4), ("--num-layers", 2)):
        args = Namespace(load=str(trained), **{flag[2:].replace("-", "_"): value})
        with pytest.raises(ValueError, match="holds a model of another shape") as error:
            check_model_shape(args)
        assert f"{value} here" in str(error.value)
        assert "\n" not in str(error.value)
    check_model_shape(Namespace(load=str(trained), hidden_size=32, num_layers=4))
    check_model_shape(Namespace(load="nowhere", hidden_size=48))


def test_another_configuration_stops_the_run_in_one_line(trained: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "other", 6, *LONGACT, "--longact-ratio", "0.5", *OVERLAPPED, ranks=2, load=trained)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("megatron_longact:")]
    assert len(lines) == 1
    assert "--longact-ratio 0.3 -> 0.5" in lines[0]
    assert "--longact-on-mismatch use-flags" in lines[0]
