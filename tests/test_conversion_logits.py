"""A converted model is the same function: Megatron's logits against those of transformers, through Megatron's `--load`.

fp32, randomly initialised; 1e-4 of the largest logit is asked for, 1e-6 is what is seen. EP is checked with experts.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_longact.conversion import to_megatron
from megatron_longact.conversion.hf_config import model_from_config
from megatron_longact.conversion.megatron_args import model_args
from tests import ranks
from tests.conversion import (
    FAMILIES,
    SMALL,
    config_of,
    hf_logits,
    make_hf,
    megatron_logits,
    remembered_tokenizers,
)
from tests.ranks import Layout
from tests.tokenizers import save_hugging_face_tokenizer

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


@pytest.mark.parametrize(("family", "unscaled"), [("llama3", "mistral"), ("qwen3-yarn", "qwen3")])
def test_rope_scaling_is_seen(tmp_path: Path, family: str, unscaled: str) -> None:
    """The comparison above could not tell scaled from plain RoPE if this were below its tolerance."""
    make_hf(family, tmp_path / "scaled")
    make_hf(unscaled, tmp_path / "plain")
    scaled, plain = (hf_logits(tmp_path / name, TOKENS) for name in ("scaled", "plain"))
    assert (scaled - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_checkpoint_remembers_its_tokenizer_wherever_it_lies(tmp_path: Path) -> None:
    hf, first, moved, bare = (tmp_path / name for name in ("hf", "first", "moved", "bare"))
    make_hf("qwen3", hf)
    to_megatron.convert(hf, bare)
    save_hugging_face_tokenizer(hf)
    to_megatron.convert(hf, first)
    shutil.copytree(first, moved)
    shutil.rmtree(first / "hf")
    other = save_hugging_face_tokenizer(tmp_path / "other", eos="<|end|>")
    load = ["--pretrained-checkpoint", str(moved), "--load"]
    given = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    calls = [
        [*load, str(tmp_path / "run")],  # a run that has not saved yet
        [*load, str(moved)],
        [*load, str(moved), "--tokenizer-model", str(other)],
        [*load, str(moved), *given],
        ["--load", str(first)],
        ["--load", str(first), *given],
        ["--load", str(bare)],
        ["--load", str(bare), *given],
    ]
    got = ranks.run(remembered_tokenizers, world_size=1, layout=Layout(), calls=calls)[0]
    kind, ids = "HuggingFaceTokenizer", got[0][2]
    assert len(ids) > 1
    assert got[:2] == [(kind, str(moved / "hf"), ids)] * 2
    assert got[2][:2] == (kind, str(other))
    assert got[3] == got[5] == got[7] == ("NullTokenizer", None, [])
    assert got[4].startswith(f"the checkpoint {first} remembers the tokenizer {first / 'hf'}, which is not there: give")
    assert got[6].startswith(f"the checkpoint {bare} remembers no tokenizer, as the folder")


YARNS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": 32},  # what Qwen's recipe has
    {"factor": 4.0},  # then the original length is max_position_embeddings
    {"factor": None, "original_max_position_embeddings": 16},  # then it is the ratio of the two
    {"factor": 2.5, "original_max_position_embeddings": 24, "beta_fast": 4, "beta_slow": 0.5, "truncate": False},
    {"factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 0.9, "mscale": 0.5},
    {"factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7, "beta_fast": None, "truncate": None},
    {"factor": 1.0, "original_max_position_embeddings": 32, "attention_factor": 1.0},
]


def megatron_yarn(*, args: list[dict[str, Any]]) -> list[tuple[torch.Tensor, float]]:
    """Angles [64, hn] and the factor of cos and sin that Megatron makes of its arguments."""
    from types import SimpleNamespace

    from megatron.core.models.common.embeddings import YarnRotaryEmbedding
    from megatron.training.argument_utils import _apply_yarn_config_from_args

    made = []
    for values in args:
        config = SimpleNamespace()
        _apply_yarn_config_from_args(config, SimpleNamespace(**values))
        settings = {name.removeprefix("yarn_"): value for name, value in vars(config).items()}
        settings["scaling_factor"] = settings.pop("rotary_scaling_factor")
        rope = YarnRotaryEmbedding(
            values["kv_channels"], rotary_base=values["rotary_base"], use_cpu_initialization=True, **settings
        )
        angles, mscale = rope.get_emb(64)
        made.append((angles[:, 0, 0], mscale))
    return made


def test_yarn_turns_as_in_transformers() -> None:
    """Every setting that config.json may have, or leave to a default: frequencies, and the attention factor."""
    settings = [{"type": "yarn", "rope_theta": 1e3, **yarn} for yarn in YARNS]
    configs = [config_of("qwen3", rope_parameters=dict(each)) for each in settings]
    files = [json.loads(config.to_json_string(use_diff=False)) for config in configs]
    models = [model_from_config(file | {"rope_parameters": each}) for file, each in zip(files, settings, strict=True)]
    [made] = ranks.run(megatron_yarn, args=[model_args(model) for model in models])
    for config, (angles, mscale) in zip(configs, made, strict=True):
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
        wanted = torch.arange(64.0)[:, None] * torch.cat((inv_freq, inv_freq))
        torch.testing.assert_close(angles, wanted, rtol=1e-6, atol=0)
        assert mscale == pytest.approx(attention_factor, rel=1e-12)
