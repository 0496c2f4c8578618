"""A converted model is the same function: Megatron's logits against those of transformers, through Megatron's `--load`.

fp32, randomly initialised; 1e-4 of the largest logit is asked for, 1e-6 is what is seen. EP is checked with experts.
"""

from pathlib import Path

import pytest
import torch

from megatron_longact.conversion import to_megatron
from tests import ranks
from tests.conversion import FAMILIES, SMALL, hf_logits, make_hf, megatron_logits
from tests.ranks import Layout

pytestmark = pytest.mark.timeout(200)  # the first one starts the ranks

TOKENS = torch.randint(SMALL["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
STRICT = ["--dist-ckpt-strictness", "raise_unexpected"]  # everything that the model asks for is in the checkpoint


def converted(folder: Path, family: str) -> tuple[Path, torch.Tensor]:
    """A family's Megatron checkpoint, and the logits that transformers has."""
    if not folder.exists():
        make_hf(family, folder / "hf")
        to_megatron.convert(folder / "hf", folder / "megatron")
    return folder / "megatron", hf_logits(folder / "hf", TOKENS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def logits(load: Path, layout: Layout, *, fused_norms: bool = False) -> torch.Tensor:
    results = ranks.run(
        megatron_logits,
        world_size=layout.tp * layout.pp * layout.ep,
        layout=layout,
        load=load,
        tokens=TOKENS,
        sizes=layout,
        flags=STRICT,
        fused_norms=fused_norms,
    )
    whole: torch.Tensor = results[-1]
    return whole


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    vocab = wanted.shape[-1]
    assert got[..., :vocab].allclose(wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert not got[..., vocab:].any()  # the padding


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=["tp1", "tp2"])
def test_logits_are_those_of_transformers(models: Path, family: str, layout: Layout) -> None:
    load, wanted = converted(models / family, family)
    assert_same(logits(load, layout), wanted)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "qwen3-moe"])
def test_logits_over_pipeline_stages(models: Path, family: str) -> None:
    load, wanted = converted(models / family, family)
    assert_same(logits(load, Layout(pp=2)), wanted)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3-moe"])
def test_layers_with_transformer_engines_names_load_too(models: Path, family: str) -> None:
    load, wanted = converted(models / family, family)
    assert_same(logits(load, Layout(), fused_norms=True), wanted)


def test_experts_are_spread_over_expert_parallel_ranks(models: Path) -> None:
    load, wanted = converted(models / "qwen3-moe", "qwen3-moe")
    assert_same(logits(load, Layout(ep=2)), wanted)


def test_rope_scaling_is_seen(tmp_path: Path) -> None:
    """The comparison above could not tell scaled from plain RoPE if this were below its tolerance."""
    make_hf("llama3", tmp_path / "scaled")
    make_hf("mistral", tmp_path / "plain")
    scaled, plain = (hf_logits(tmp_path / name, TOKENS) for name in ("scaled", "plain"))
    assert (scaled - plain).abs().max() > 1e-3 * plain.abs().max()
