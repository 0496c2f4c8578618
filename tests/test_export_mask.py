"""From Hugging Face through a training with LongAct and back: masks, weights, and what an audit of them says.

One real run: a converted checkpoint, two ranks, Megatron's optimizer, then every tool on what it saved.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_longact.conversion import masks, to_hf, to_megatron
from megatron_longact.conversion.audit import audit
from megatron_longact.conversion.torch_dist import read_common_state
from tests.conversion import make_hf
from tests.ranks import run_program
from tests.test_run import PROGRAMS

pytestmark = pytest.mark.timeout(400)
TOOLS = Path(__file__).parent.parent / "tools"
TRAINING = """
    --use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 100
    --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 3 --eval-iters 0 --eval-interval 1000
    --lr 1e-2 --weight-decay 0.1 --log-interval 1 --no-create-attention-mask-in-dataloader --bf16
    --use-distributed-optimizer --tensor-model-parallel-size 2 --ckpt-format torch_dist --save-interval 3
    --longact --longact-refresh-interval 0
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: the start; megatron: converted; saved: after three steps at TP 2 with a mask that stays."""
    folder = tmp_path_factory.mktemp("trained")
    make_hf("qwen3", folder / "hf", dtype=torch.bfloat16)
    to_megatron.convert(folder / "hf", folder / "megatron")
    paths = ["--load", str(folder / "megatron"), "--save", str(folder / "saved")]
    result = run_program(str(PROGRAMS / "pretrain_lean.py"), *TRAINING.split(), *paths, world_size=2)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def mask(trained: Path) -> Path:
    """What the tool exports."""
    path = trained / "mask.safetensors"
    command = [TOOLS / "export_mask.py", "--load", trained / "saved", "--save", path]
    result = run_program(*map(str, command), launcher=False, cpu=False)
    assert result.returncode == 0, result.stderr
    assert "updated are 29.7% of the Q rows" in result.stdout
    return path


def test_masks_and_saliency_are_those_of_the_checkpoint(trained: Path, mask: Path) -> None:
    state = read_common_state(trained / "saved" / "iter_0000003")["opt_param_scheduler"]["longact"]
    tensors = load_file(mask)
    assert len(tensors) == 2 * 2 * 2
    for layer in range(2):
        for part in ("q", "k"):
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            assert tensors[name].dtype == torch.bool
            assert tensors[f"{name}.saliency"].dtype == torch.float32
            assert torch.equal(tensors[name], state["masks"][part][layer])
            assert torch.equal(tensors[f"{name}.saliency"], state["saliency"][part][layer])
            chosen = tensors[f"{name}.saliency"][tensors[name]]
            assert chosen.min() >= tensors[f"{name}.saliency"][~tensors[name]].max()
    assert tensors["model.layers.0.self_attn.q_proj"].shape == (64,)
    assert tensors["model.layers.0.self_attn.q_proj"].sum() == 19  # 30 % of 64
    assert tensors["model.layers.0.self_attn.k_proj"].shape == (32,)
    with safe_open(mask, "pt") as opened:
        assert opened.metadata()["updates"] == "3"
        assert json.loads(opened.metadata()["longact_config"])["refresh_interval"] == 0


def test_only_rows_of_the_mask_changed(trained: Path, mask: Path) -> None:
    to_hf.convert(trained / "saved", trained / "hf", trained / "back")
    result = audit(trained / "hf", trained / "back", mask=mask)
    assert result.changed_outside == 0
    masked = [change for change in result.changes if change.masked]
    assert [change.name.split(".")[-2] for change in masked] == ["k_proj", "q_proj"] * 2
    for change in masked:
        assert change.changed_inside == change.rows_in_mask
    others = [change for change in result.changes if change.name.endswith(("v_proj.weight", "down_proj.weight"))]
    assert others
    assert all(change.rows_changed == change.rows for change in others)


def test_checkpoints_without_a_mask_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no LongAct state"):
        masks.export(trained / "megatron", tmp_path / "mask")
    with pytest.raises(ValueError, match="no Megatron checkpoint"):
        masks.export(trained, tmp_path / "mask")
    with pytest.raises(ValueError, match="cannot write"):
        masks.export(trained / "saved", Path("/proc/nowhere/mask"))
    assert not list(tmp_path.iterdir())
