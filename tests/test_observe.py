"""tools/observe.py: statistics against a plain loop and against Megatron's, what is said of them, and what is refused.

fp32 throughout; 1e-4 of the largest value is asked of two programs that run the same model, 1e-6 is what is seen.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_longact.analysis.activations import hf as activations_hf
from megatron_longact.analysis.activations.checkpoints import run_name, run_names
from megatron_longact.analysis.activations.measurement import Measurement, measure, pooled
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.analysis.observe.outliers import RopeFrequencies, rope_profile, spreads
from megatron_longact.attention_layout import Section
from megatron_longact.conversion import to_megatron
from megatron_longact.qkv_layout import QKVLayout
from tests import launch, ranks
from tests.conversion import build_from_args, make_hf
from tests.ranks import Layout
from tests.tokenizers import SENTENCEPIECE, save_hugging_face_tokenizer

pytestmark = pytest.mark.timeout(200)  # the first one with ranks starts them

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(101, (length,), generator=GENERATOR).tolist() for length in (48, 7, 33)]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family's folder, and its Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama3", "qwen2", "qwen3-yarn"):
        make_hf(family, folder / family)
        with redirect_stdout(io.StringIO()):
            to_megatron.convert(folder / family, folder / f"{family}-megatron")
    return folder


def assert_same(got: Measurement, wanted: Measurement) -> None:
    assert got.tokens == wanted.tokens
    assert got.layer_numbers == wanted.layer_numbers
    assert got.scores.keys() == wanted.scores.keys()
    for key, scores in wanted.scores.items():
        for ours, theirs in zip(got.scores[key], scores, strict=True):
            assert ours.dtype == torch.float32
            assert ours.shape == theirs.shape
            assert ours.allclose(theirs, rtol=0, atol=1e-4 * float(theirs.max())), key


def plain_statistics(folder: Path) -> dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]]:
    """By tap and statistic, Q and K of each layer, from the hidden states and the weights; no hooks."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for i, layer in enumerate(model.model.layers):
        parts: dict[str, list[torch.Tensor]] = {}
        for part in ("q", "k"):
            rows = []
            for prompt in PROMPTS:
                hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[i]
                projection = getattr(layer.self_attn, f"{part}_proj")
                rows.append(projection(layer.input_layernorm(hidden))[0])
            parts[part] = [torch.cat(rows)]  # [t, channels]
            norm = getattr(layer.self_attn, f"{part}_norm", None)
            if norm is not None:
                heads = parts[part][0].unflatten(1, (-1, layer.self_attn.head_dim))
                parts[part].append(norm(heads).flatten(1))
        for tap, q, k in zip(("projection", "norm"), parts["q"], parts["k"], strict=False):
            found.setdefault((tap, "mean-abs"), []).append(tuple(x.abs().mean(0) for x in (q, k)))  # type: ignore[arg-type]
            found.setdefault((tap, "rms"), []).append(tuple(x.square().mean(0).sqrt() for x in (q, k)))  # type: ignore[arg-type]
            found.setdefault((tap, "max-abs"), []).append(tuple(x.abs().amax(0) for x in (q, k)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Qwen3-8B", "Qwen3-8B"),
        ("SmolLM2/hf", "SmolLM2"),
        ("demo/checkpoints", "demo"),
        ("hub/models--Qwen--Qwen3-8B/snapshots/0123abc", "Qwen3-8B"),
    ],
)
def test_a_model_is_called_by_its_own_name(tmp_path: Path, folder: str, name: str) -> None:
    assert run_name(tmp_path / folder) == name


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = ["high/seed-1/checkpoints", "low/seed-1/checkpoints", "low/seed-2/checkpoints", "low/seed-2/checkpoints"]
    names = ["high/seed-1", "low/seed-1", "seed-2", "seed-2"]
    assert run_names([tmp_path / folder for folder in folders]) == names
    snapshots = [tmp_path / f"models--{owner}--Qwen3-8B/snapshots/{owner}" for owner in "ab"]
    assert run_names(snapshots) == ["a/Qwen3-8B", "b/Qwen3-8B"]
    assert run_names([]) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_statistics_of_a_folder_are_those_of_its_weights(models: Path, family: str) -> None:
    source = activations_hf.open_folder(models / family)
    measured = measure(source, PROMPTS)
    with torch.no_grad():
        wanted = plain_statistics(models / family)
    assert measured.tokens == 48 + 7 + 33
    assert measured.scores.keys() == wanted.keys()
    assert len(wanted) == (6 if family == "qwen3" else 3)
    for key, layers in wanted.items():
        for number, (q, k) in enumerate(layers):
            ours = measured.channel_values(*key, source.layout)[number]  # type: ignore[arg-type]
            torch.testing.assert_close(ours["q"], q, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(ours["k"], k, rtol=1e-4, atol=1e-6)


def megatron_measurement(*, load: Path, sizes: Layout, flags: list[str]) -> tuple[Measurement, torch.Tensor | None]:
    """On each rank: Megatron's `load_checkpoint`, then the source that the tools use."""
    from megatron.core import parallel_state
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.global_vars import unset_global_variables

    from megatron_longact.analysis.activations.megatron import MegatronSource

    parallel = [f"--tensor-model-parallel-size={sizes.tp}", f"--pipeline-model-parallel-size={sizes.pp}"]
    with redirect_stdout(io.StringIO()):
        model = build_from_args(load, [*parallel, *flags])
        load_checkpoint([model], None, None)
    try:
        dp_group = parallel_state.get_data_parallel_group()
        source = MegatronSource("megatron", [model], lambda text: [], positions=64, dp_group=dp_group)
        measured = measure(source, PROMPTS)
        assert not torch.is_grad_enabled() or not any(p.grad is not None for p in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert_same(measure(source, PROMPTS), measured)  # nothing is carried over
        return measured, source.inv_freq
    finally:
        unset_global_variables()


@pytest.mark.parametrize(
    ("family", "layout", "world"),
    [
        ("qwen3", Layout(), 1),
        ("qwen3", Layout(tp=2), 2),
        ("qwen3", Layout(pp=2), 2),
        ("qwen3", Layout(), 2),  # three prompts on two replicas
        ("llama3", Layout(tp=2), 2),
        ("qwen3-yarn", Layout(), 1),
    ],
    ids=["one rank", "tp2", "pp2", "dp2", "llama tp2", "yarn"],
)
def test_megatron_and_transformers_agree(models: Path, family: str, layout: Layout, world: int) -> None:
    source = activations_hf.open_folder(models / family)
    assert source.positions == 64
    wanted = measure(source, PROMPTS)
    results = ranks.run(
        megatron_measurement,
        world_size=world,
        layout=layout,
        load=models / f"{family}-megatron",
        sizes=layout,
        flags=["--sequence-parallel"] if layout.tp > 1 and family == "llama3" else [],
    )
    for measured, inv_freq in results:
        assert_same(measured, wanted)
        assert inv_freq is not None
        assert source.inv_freq is not None
        torch.testing.assert_close(inv_freq, source.inv_freq, rtol=1e-5, atol=0)


def test_pooled_parts_are_the_whole(models: Path) -> None:
    source = activations_hf.open_folder(models / "qwen3")
    parts = [measure(source, [prompt]) for prompt in PROMPTS]
    assert_same(pooled(parts), measure(source, PROMPTS))


def test_what_cannot_be_measured_is_refused(models: Path) -> None:
    source = activations_hf.open_folder(models / "qwen3")
    with pytest.raises(ValueError, match="0 prompts"):
        measure(source, [])
    with pytest.raises(ValueError, match="shortest of 0 tokens"):
        measure(source, [[1, 2], []])
    assert source.embeddings is not None
    with pytest.raises(
        ValueError, match=f"has the token id {source.embeddings}, but the model has {source.embeddings} "
    ):
        measure(source, [[1, source.embeddings], [2]])
    with torch.no_grad():
        source.attentions[1].k_proj.weight[3] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"of K in layer 1 \(projection\) holds NaN"):
        measure(source, PROMPTS)


def test_spreads_on_paper() -> None:
    q = torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0, 18.0, 2.0, 1.0])  # two heads of four channels; median 2
    k = torch.ones(4)
    rope = RopeFrequencies(torch.tensor([1.0, 0.01]))
    first, second = spreads({1: {"q": q, "k": k}}, layout=QKVLayout(2, 1, 4), ratio=0.25, rope=rope)
    assert (first.layer, first.part, first.head, first.channel) == (1, "q", 1, 1)
    assert first.outlier_ratio == 9.0
    assert first.top_share == pytest.approx(21 / 30)
    assert (first.outliers, first.channels) == (1, 8)
    assert first.wavelength == pytest.approx(628.3, abs=0.1)  # channel 1 of 4: the second of two frequencies
    assert second.outlier_ratio == 1.0
    assert second.top_share == 0.25


@pytest.mark.parametrize(("interleaved", "wanted"), [(False, [5.0, 7.0]), (True, [7.0, 5.0])])
def test_channels_of_a_pair_share_a_frequency(interleaved: bool, wanted: list[float]) -> None:
    section = Section("q", 2, 6)  # four of six channels turn
    scores = torch.ones(12)
    scores[2], scores[7], scores[5] = 5.0, 7.0, 100.0  # head 0 channel 2, head 1 channel 1, one that does not turn
    rope = RopeFrequencies(torch.tensor([1.0, 0.1]), interleaved)
    assert rope_profile(scores, section=section, rope=rope).tolist() == wanted
    assert rope.pair(5, section) is None
    latent = Section("q", 2, 8, rope=2)  # as multi-latent attention has them: two channels that do not turn come first
    moved = torch.cat([torch.ones(2, 2), scores.view(2, 6)], dim=1).flatten()
    assert rope_profile(moved, section=latent, rope=rope).tolist() == wanted
    assert [rope.pair(channel, latent) is None for channel in range(8)] == [True] * 2 + [False] * 4 + [True] * 2


def run_tool(*arguments: str | Path) -> int:
    status: int = load_tool("observe").main([str(argument) for argument in arguments])
    return status


@pytest.fixture(scope="module")
def with_outlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its tokenizer; K channel 5 of head 1 in layer 1 is forty times as large as it was."""
    import transformers

    folder = tmp_path_factory.mktemp("outlier") / "planted"
    config = transformers.AutoConfig.for_model(
        "qwen3",
        num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=320, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[16 + 5] *= 40
    model.save_pretrained(folder)
    save_hugging_face_tokenizer(folder)
    return folder


def test_a_planted_outlier_is_found_and_drawn(with_outlier: Path, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the answer is four. what is two and two? " * 60)
    output = tmp_path / "out"
    given = ["--hf-dir", with_outlier, "--prompts", text, "--lengths", "64", "256", "--html", tmp_path / "page.html"]
    assert run_tool(*given, "--output", output) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 4
    assert '<th scope="row">1 K</th><td>' in page
    assert "planted has outliers" in page
    results = json.loads((output / "observation.json").read_text())
    first = results["lengths"]["256"]["taps"]["projection"]["mean-abs"][0]
    assert (first["layer"], first["part"], first["head"], first["channel"]) == (1, "k", 1, 5)
    assert first["outlier_ratio"] > 15
    assert first["wavelength"] == pytest.approx(2 * torch.pi * 10000 ** (5 / 8), rel=1e-4)
    assert results["lengths"]["64"]["tokens"] == 4 * 64
    shown = capsys.readouterr().out
    assert "planted has outliers" in shown
    assert "layer 1 K (head 1, channel 5" in shown
    names = {path.name for path in output.glob("*.png")}
    assert names == {"overview.png", "heatmap-projection.png", "heatmap-norm.png", "rope.png"}


def test_a_model_with_all_channels_alike_has_none(models: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in PROMPTS))
    assert run_tool("--hf-dir", models / "llama3", "--prompts", rows, "--output", tmp_path / "out") == 0
    assert "llama3 has no outliers" in capsys.readouterr().out
    assert not (tmp_path / "out" / "heatmap-norm.png").exists()


def test_ruler_prompts_are_as_long_as_asked(with_outlier: Path) -> None:
    source = activations_hf.open_folder(with_outlier, tokenizer=SENTENCEPIECE)
    source.tokenizer = activations_hf.LocalTokenizer(SENTENCEPIECE, vocab_size=1024)
    options = PromptOptions(tasks=("niah_single_2",), lengths=(512,), num_samples=3)
    prompts = options.prompts(source, task="niah_single_2", length=512)
    assert len(prompts) == 3
    assert all(450 < len(prompt) <= 512 for prompt in prompts)
    other = options.prompts(source, task="niah_single_2", length=512, seed=7)
    assert other != prompts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --hf-dir DIR or --load DIR"),
        (["--hf-dir", "MODEL", "--load", "x"], "either --hf-dir DIR or --load DIR"),
        (["--hf-dir", "MODEL", "--tensor-model-parallel-size", "2"], "unknown with --hf-dir: --tensor-model"),
        (["--hf-dir", "nowhere"], "nowhere is no Hugging Face folder"),
        (["--hf-dir", "MODEL", "--lengths", "4096"], "4096 tokens, but the model has 1024 positions"),
        (["--hf-dir", "MODEL", "--tasks", "poetry"], "--tasks has 'poetry'; RULER's tasks are niah_single_1"),
        (["--hf-dir", "MODEL", "--tasks", "vt", "--prompts", "x"], "they do not go with --prompts"),
        (["--hf-dir", "MODEL", "--prompts", "nothing.txt"], "cannot read --prompts nothing.txt"),
        (["--hf-dir", "MODEL", "--num-samples", "0"], "--num-samples is 0"),
        (["--hf-dir", "MODEL", "--ratio", "0"], "--ratio is 0.0; it must be a share"),
        (["--hf-dir", "MODEL", "--lengths", "512", "--tokenizer", SENTENCEPIECE], "but the model has 320 embeddings"),
        (["--hf-dir", "MODEL", "--lengths", "512", "--tokenizer", ROOT], "holds no tokenizer"),
    ],
)
def test_mistakes_are_one_line(
    with_outlier: Path, tmp_path: Path, capsys: Any, arguments: list[str | Path], said: str
) -> None:
    given = [with_outlier if argument == "MODEL" else argument for argument in arguments]
    assert run_tool(*given, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("observe: ")
    assert error.count("\n") == 1
    assert said in error


def make_observe(*flags: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """What `make observe` calls, where pip finds nothing."""
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    given = {name: str(value) for name, value in environment.items()}
    command = ["bash", "examples/smollm2/observe.sh", *flags]
    return launch.run(command, timeout=120, environment=launch.QUIET | no_index | {"PYTHON": sys.executable} | given)


def test_a_folder_of_ones_own_is_observed_without_the_package_index(with_outlier: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ("--tasks", "niah_single_1", "--lengths", "1024")
    first = make_observe(*flags, SMOLLM2=with_outlier, RUN_DIR=run_dir)
    assert first.returncode == 0, first.stderr
    assert "planted has outliers: the largest channel is" in first.stdout
    assert (run_dir / "observe" / "overview.png").exists()
    made = (run_dir / "megatron" / "latest_checkpointed_iteration.txt").stat()
    again = make_observe("--tasks", "poetry", RUN_DIR=run_dir)
    assert "--tasks has 'poetry'" in again.stderr  # all before the observation is there, and taken as it is
    assert again.stdout == ""
    assert (run_dir / "megatron" / "latest_checkpointed_iteration.txt").stat() == made
    other = make_observe(SMOLLM2=tmp_path, RUN_DIR=run_dir)
    assert f"holds the model of {with_outlier}, not that of {tmp_path}" in other.stderr


@pytest.mark.parametrize(
    ("smollm2", "said"),
    [
        ("", "call: SMOLLM2=FOLDER make observe"),
        ("nowhere", "SMOLLM2=nowhere is no folder"),
        ("tests", "tests holds neither a config.json nor one GGUF file"),
    ],
)
def test_without_a_model_one_line_says_what_to_bring(tmp_path: Path, smollm2: str, said: str) -> None:
    done = make_observe(SMOLLM2=smollm2, RUN_DIR=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("observe: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
