"""tools/disrupt.py: exactly the chosen rows change, alike in any layout, and nothing stays behind."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_longact.analysis.disrupt import report as disrupt_report
from megatron_longact.analysis.disrupt.arguments import DisruptConfig, add_disrupt_args, config_from_args
from megatron_longact.analysis.disrupt.repetition import distinct_ratio, longest_loop, loop_share
from megatron_longact.conversion import to_megatron
from megatron_longact.selection import QK
from tests import ranks
from tests.conversion import hf_logits, make_hf
from tests.launch import ROOT, demo_model_args
from tests.ranks import Layout, run_program
from tests.tokenizers import SENTENCEPIECE, DemoTokenizer

START = ROOT / "examples/demo/start_checkpoint"
LAYOUTS = {
    "tp1": (Layout(), 1),
    "tp2 sequence parallel": (Layout(tp=2), 2),
    "pp2": (Layout(pp=2), 2),
    "dp2": (Layout(), 2),
}
TOLERANCE = 2e-5
"""fp32; shards add in another order."""
TOKENS = torch.arange(40).view(2, 20) * 7 % 64


# -- on real models ----------------------------------------------------------------------------------


def built(**spec: Any) -> tuple[Any, Any]:
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size

    from megatron_longact.qkv_layers import QKVModel
    from tests.models import ModelSpec, build

    config = {"sequence_parallel": get_tensor_model_parallel_world_size() > 1}
    chunks = build(ModelSpec(layers=2, groups=2, config=config, **spec)).chunks
    return chunks, QKVModel.find(chunks)


def engine_of(chunks: Any) -> Any:
    from megatron.core import parallel_state

    from megatron_longact.generation.static import StaticRolloutEngine

    return StaticRolloutEngine(
        chunks[0].module, eod=5, vocab_size=64, max_batch_size=8, dp_group=parallel_state.get_data_parallel_group()
    )


def prompts() -> list[Any]:
    from megatron_longact.generation.engine import Prompt

    return [Prompt(tuple(row[:n].tolist()), index=i) for i, (row, n) in enumerate(zip(TOKENS, (20, 13), strict=True))]


def measured(chunks: Any, model: Any) -> Any:
    from megatron_longact.analysis.disrupt.channels import RowMeasurement
    from megatron_longact.generation.sampling import Sampling

    with RowMeasurement(model) as measurement:
        engine_of(chunks).generate(prompts(), Sampling(max_response_length=1, greedy=True))
    return measurement.result(statistic="mean-abs")


def num_hooks(chunks: Any) -> int:
    modules = [module for chunk in chunks for module in chunk.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def outputs(model: Any, run: Any) -> dict[int, Tensor]:
    """What each linear_qkv puts out in `run`, after all hooks: [t, rows of this shard], of its first forward."""
    seen: dict[int, Tensor] = {}

    def keep(layer_number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen.setdefault(layer_number, output[0].detach().flatten(0, 1).clone())

        return hook

    handles = [layer.projections[0].register_forward_hook(keep(layer.layer_number)) for layer in model.layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def forward(chunks: Any) -> Tensor:
    b, s = TOKENS.shape
    mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return chunks[0](TOKENS, torch.arange(s).expand(b, s), mask)


def statistics_by_hand() -> dict[str, Any]:
    """The measurement, and the activations that it must be of, prompt by prompt."""
    chunks, model = built()
    statistics = measured(chunks, model)
    after = num_hooks(chunks)
    per_prompt = []
    for prompt in prompts():
        tokens = torch.tensor([prompt.tokens])
        s = tokens.shape[1]
        mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)

        def run(tokens: Tensor = tokens, s: int = s, mask: Tensor = mask) -> None:
            with torch.no_grad():
                chunks[0](tokens, torch.arange(s)[None], mask)

        per_prompt.append(outputs(model, run))
    x = [torch.cat([seen[n] for seen in per_prompt]) for n in (1, 2)]
    q, k = model.layout.q_rows, model.layout.k_rows
    return {
        "statistics": (statistics.mean, statistics.std, *statistics.saliency),
        "tokens": statistics.tokens,
        "hooks": after,
        "expected": (
            torch.stack([each.mean(0) for each in x]),
            torch.stack([each.std(0, correction=0) for each in x]),
            torch.stack([each.abs().mean(0)[q] for each in x]),
            torch.stack([each.abs().mean(0)[k] for each in x]),
        ),
    }


def test_measurement_is_that_of_every_prompt_token_and_of_no_other():
    [found] = ranks.run(statistics_by_hand)
    assert found["tokens"] == 33
    assert found["hooks"] == 0
    for name, value, expected in zip(("mean", "std", "q", "k"), found["statistics"], found["expected"], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def disturbed(replacement: str) -> dict[str, Any]:
    """Outputs of linear_qkv and of the model, untouched and disturbed; on the first pipeline stage, one layer."""
    from megatron_longact.analysis.disrupt.channels import Disturbance, choose_channels

    chunks, model = built()
    statistics = measured(chunks, model)
    channels = choose_channels("high", statistics.saliency, layout=model.layout, ratio=0.3)
    plain = outputs(model, lambda: forward(chunks))
    with Disturbance(model, channels, replacement=replacement, statistics=statistics, seed=3, positions=32) as inside:
        changed = outputs(model, lambda: forward(chunks))
        rows = {layer.layer_number: inside.local_rows(layer.layer_number) for layer in model.layers}
        again = forward(chunks)
    logits = forward(chunks)
    tp = model.groups.tp
    from megatron.core import parallel_state

    gathered = torch.empty(tp.size(), *again.shape)
    torch.distributed.all_gather(list(gathered.unbind(0)), again.contiguous(), group=tp)
    return {
        "plain": plain,
        "changed": changed,
        "rows": rows,
        "channels": tuple(channels),
        "statistics": statistics,
        "hooks": num_hooks(chunks),
        "restored": torch.equal(logits, forward(built()[0])),
        "logits": torch.cat(list(gathered), dim=-1),
        "tp": parallel_state.get_tensor_model_parallel_rank(),
    }


@pytest.mark.parametrize("replacement", ["mean", "zero", "noise"])
def test_the_chosen_rows_change_and_no_others_alike_with_tensor_parallelism(replacement):
    [one] = ranks.run(disturbed, replacement=replacement)
    two = ranks.run(disturbed, layout=Layout(tp=2), world_size=2, replacement=replacement)
    for result in [one, *two]:
        assert result["hooks"] == 0
        assert result["restored"]
        for a, b in zip(result["channels"], one["channels"], strict=True):
            assert torch.equal(a, b)
        for index, n in enumerate((1, 2)):
            rows, changed = result["rows"][n], result["changed"][n]
            others = torch.ones(changed.shape[1], dtype=torch.bool)
            others[rows] = False
            if n == 1:  # the second layer reads what the first one changed
                assert torch.equal(changed[:, others], result["plain"][n][:, others])
            mean, std = result["statistics"].mean[index, rows], result["statistics"].std[index, rows]
            if replacement == "mean":
                assert torch.equal(changed[:, rows], mean.expand(len(changed), -1))
            elif replacement == "zero":
                assert not changed[:, rows].any()
            else:
                noise = (changed[:, rows] - mean) / std
                # 20 positions (both sequences have the same noise) x 40 rows or so: mean within 4 standard errors
                assert abs(float(noise.mean())) < 4 / math.sqrt(20 * len(rows))
                assert 0.8 < float(noise.std()) < 1.2
    assert len(one["rows"][1]) == int(one["channels"][0][0].sum() + one["channels"][1][0].sum()) == 10 + 5
    for n in (1, 2):
        whole = torch.cat([result["changed"][n] for result in two], dim=1)
        torch.testing.assert_close(whole, one["changed"][n], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(two[0]["logits"], one["logits"], rtol=0, atol=TOLERANCE)


def generated(replacement: str) -> dict[str, Any]:
    """Responses and a perplexity with the highest channels replaced, by the engine, and what stays of it."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.analysis.disrupt.channels import Disturbance, choose_channels
    from megatron_longact.generation.sampling import Sampling
    from megatron_longact.rl.perplexity import perplexity

    chunks, model = built()
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    statistics = measured(chunks, model)
    channels = choose_channels("high", statistics.saliency, layout=model.layout, ratio=0.5)
    sampling = Sampling(max_response_length=8, greedy=True)

    def ask() -> tuple[Tensor, Tensor, float]:
        made = engine_of(chunks).generate(prompts(), sampling)
        return made.tokens, made.log_probs, perplexity(chunks, TOKENS.tolist(), vocab_size=64, pgs=pgs)

    before = ask()
    with Disturbance(model, channels, replacement=replacement, statistics=statistics, seed=1, positions=40):
        inside = ask()
    result = {"before": before, "inside": inside, "after": ask(), "saliency": tuple(statistics.saliency)}
    if torch.distributed.get_world_size() == 1:
        log_probs = forward(chunks)[:, :-1].float().log_softmax(-1)
        result["perplexity"] = float(torch.exp(-log_probs.gather(-1, TOKENS[:, 1:, None]).mean()))
    return result


@pytest.mark.parametrize("replacement", ["mean", "noise"])
def test_generation_and_perplexity_agree_in_every_layout(replacement):
    results = {
        name: ranks.run(generated, layout=layout, world_size=world, replacement=replacement)
        for name, (layout, world) in LAYOUTS.items()
    }
    one = results["tp1"][0]
    assert one["before"][2] == pytest.approx(one["perplexity"], rel=TOLERANCE)
    assert one["before"][2] != pytest.approx(one["inside"][2], rel=1e-3)
    assert not torch.allclose(one["before"][1], one["inside"][1], atol=1e-3)
    for name, of_ranks in results.items():
        for result in of_ranks:
            for when in ("before", "inside", "after"):
                tokens, log_probs, ppl = result[when]
                expected = one["before" if when == "after" else when]
                assert torch.equal(tokens, expected[0]), (name, when)
                torch.testing.assert_close(log_probs, expected[1], rtol=0, atol=TOLERANCE)
                assert ppl == pytest.approx(expected[2], rel=TOLERANCE)
            for a, b in zip(result["saliency"], one["saliency"], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


LATENT = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
"""Multi-latent attention."""


def noise_with_and_without_cache() -> list[tuple[Tensor, Tensor]]:
    return [noise_cached_and_whole(), noise_cached_and_whole(mla=LATENT)]


def noise_cached_and_whole(**spec: Any) -> tuple[Tensor, Tensor]:
    """Log-probs of the sampled tokens, by the engine with its KV cache and by one whole forward, both disturbed."""
    from megatron_longact.analysis.disrupt.channels import Disturbance, choose_channels
    from megatron_longact.generation.sampling import Sampling

    chunks, model = built(**spec)
    statistics = measured(chunks, model)
    channels = choose_channels("random", statistics.saliency, layout=model.layout, ratio=0.5, seed=2)
    [prompt, _] = prompts()
    with Disturbance(model, channels, replacement="noise", statistics=statistics, seed=1, positions=40):
        made = engine_of(chunks).generate([prompt], Sampling(max_response_length=6, greedy=True))
        n = int(made.lengths[0])
        tokens = torch.tensor([[*prompt.tokens, *made.tokens[0, :n].tolist()]])
        s = tokens.shape[1]
        mask = torch.ones(1, 1, s, s, dtype=torch.bool).triu(1)
        with torch.no_grad():
            logits = chunks[0](tokens, torch.arange(s)[None], mask)[0].float()
    log_probs = logits.log_softmax(-1)[-n - 1 : -1].gather(-1, tokens[0, -n:, None])[:, 0]
    return made.log_probs[0, :n], log_probs


def test_noise_of_a_token_is_the_same_with_and_without_a_cache():
    for cached, whole in ranks.run(noise_with_and_without_cache)[0]:
        assert len(cached) > 1
        torch.testing.assert_close(cached, whole, rtol=0, atol=TOLERANCE)


def exception_inside() -> tuple[int, int, str]:
    from megatron_longact.analysis.disrupt.channels import Disturbance, RowMeasurement, choose_channels

    chunks, model = built()
    statistics = measured(chunks, model)
    channels = choose_channels("low", statistics.saliency, layout=model.layout, ratio=0.3)
    inside = 0
    try:
        with (
            RowMeasurement(model),
            Disturbance(model, channels, replacement="noise", statistics=statistics, positions=4),
        ):
            inside = num_hooks(chunks)
            forward(chunks)  # 20 positions, 4 with noise
    except IndexError as error:
        return inside, num_hooks(chunks), type(error).__name__
    raise AssertionError


def test_hooks_come_off_after_an_exception():
    assert ranks.run(exception_inside) == [(5, 0, "IndexError")]


def nothing_seen() -> str:
    from megatron_longact.analysis.disrupt.channels import RowMeasurement

    _, model = built()
    with RowMeasurement(model) as measurement:
        pass
    with pytest.raises(ValueError, match="saw no token"):
        measurement.result(statistic="mean-abs")
    return "refused"


def test_a_measurement_of_nothing_is_refused():
    assert ranks.run(nothing_seen) == ["refused"]


# -- which channels ------------------------------------------------------------------------------------


def saliency() -> tuple[QK, Any]:
    from megatron_longact.qkv_layout import QKVLayout

    layout = QKVLayout(num_attention_heads=2, num_query_groups=1, kv_channels=5)
    generator = torch.Generator().manual_seed(0)
    return QK(torch.rand(3, 10, generator=generator), torch.rand(3, 5, generator=generator)), layout


def windows_of_text(length: int) -> list[tuple[list[int], list[list[int]]]]:
    """The first ids of the built-in prose, and three windows, with tokenizers that begin texts with nothing or <s>."""
    from megatron_longact.rl.data.prose import text_windows
    from megatron_longact.tasks.needle import sentences_of
    from tests.tokenizers import AddsTokens, DemoTokenizer

    ids = DemoTokenizer().tokenize(" ".join(sentences_of("heldout")))[: 3 * length]
    return [
        (ids, text_windows(None, tokenizer, length=length, count=3))
        for tokenizer in (DemoTokenizer(), AddsTokens(end=True))
    ]


def test_each_window_of_text_begins_as_the_tokenizer_begins_a_text():
    [[(ids, plain), (_, begun)]] = ranks.run(windows_of_text, length=16)
    assert plain == [ids[i : i + 16] for i in (0, 16, 32)]
    assert begun == [[1, *ids[i : i + 15]] for i in (0, 15, 30)]


@pytest.mark.parametrize("scope", ["layer", "head", "model"])
def test_high_low_and_random_channels_are_as_many(scope):
    from megatron_longact.analysis.disrupt.channels import choose_channels

    scores, layout = saliency()
    chosen = {
        name: choose_channels(name, scores, layout=layout, ratio=0.4, scope=scope, seed=1)
        for name in ("high", "low", "random")
    }
    assert {(int(m.q.sum()), int(m.k.sum())) for m in chosen.values()} == {(12, 6)}
    assert not (chosen["high"].q & chosen["low"].q).any()
    assert scores.q[chosen["high"].q].mean() > scores.q.mean() + 0.1 > scores.q[chosen["low"].q].mean() + 0.2
    only_k = choose_channels("high", scores, layout=layout, ratio=0.4, scope=scope, targets="k")
    assert not only_k.q.any()
    assert torch.equal(only_k.k, chosen["high"].k)
    other = choose_channels("random", scores, layout=layout, ratio=0.4, scope=scope, seed=2)
    assert not torch.equal(other.q, chosen["random"].q)


def test_channels_of_a_mask_have_as_many_low_and_random_ones_in_each_layer():
    from megatron_longact.analysis.disrupt.channels import as_many, check_masks, shared

    scores, layout = saliency()
    masks = QK(torch.zeros(3, 10, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool))
    masks.q[0, :2] = masks.q[2, :7] = masks.k[1, 3] = True
    chosen = {name: as_many(name, masks, scores, layout=layout) for name in ("high", "low", "random")}
    assert chosen["high"] is masks
    for name in ("low", "random"):
        assert chosen[name].q.sum(-1).tolist() == [2, 0, 7]
        assert chosen[name].k.sum(-1).tolist() == [0, 1, 0]
    assert chosen["low"].q[0].nonzero().flatten().tolist() == sorted(scores.q[0].argsort()[:2].tolist())
    assert shared(masks, masks) == 1
    assert shared(masks, QK(~masks.q, masks.k)) == pytest.approx(1 / 10)
    dense = QK(masks.q, torch.ones_like(masks.k))
    with pytest.raises(ValueError, match="x marks every K channel; leave that projection out with --targets q"):
        check_masks(dense, source="x", targets="qk")
    assert not check_masks(dense, source="x", targets="q").k.any()


# -- repetition, on paper --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([], 0),
        ([1], 0),
        ([1, 2, 3, 4], 0),
        ([1, 1], 2),
        ([1, 2, 1], 0),
        ([1, 2, 1, 2], 4),
        ([1, 2, 1, 2, 1], 5),
        ([9, 1, 2, 3, 1, 2, 3, 8], 6),
        ([5, 5, 1, 2, 3, 1, 2, 3, 1], 7),
        ([1, 2, 3, 9, 1, 2, 3], 0),
        ([4] * 30, 30),
    ],
)
def test_longest_loop(tokens, loop):
    assert longest_loop(tokens) == loop
    assert loop_share(tokens) == (loop / len(tokens) if tokens else 0)


def test_distinct_ratio():
    assert distinct_ratio([1, 2, 3], 1) == 1
    assert distinct_ratio([1, 2, 1, 2], 1) == 0.5
    assert distinct_ratio([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct_ratio([7] * 10, 3) == pytest.approx(1 / 8)
    assert distinct_ratio([1, 2], 3) is None


def test_a_summary_and_its_table():
    rows = [
        response(length=64, score=100.0, loop=0, tokens=4, distinct=1.0),
        response(length=64, score=0.0, loop=8, tokens=8, distinct=0.5, finished=False),
        response(length=128, score=0.0, loop=0, tokens=2, distinct=None),
    ]
    runs = [
        disrupt_report.Run("", "", rows, 12.0).results(),
        disrupt_report.Run("high", "mean", rows, 34.5678).results(),
    ]
    assert runs[0]["accuracy_by_length"] == {"64": 50.0, "128": 0.0}
    assert runs[0]["distinct_3"] == 0.75
    assert runs[0]["loop_share"] == pytest.approx(100 / 3)
    assert runs[0]["unfinished"] == pytest.approx(100 / 3)
    shown = disrupt_report.table(runs).split("\n")
    accuracy = ["50.0", "(9-91)", "0.0", "(0-79)", "33.3", "(6-79)"]
    assert shown[1].split() == ["undisturbed", *accuracy, "0.750", "2.7", "33.3", "33.3", "12"]
    assert runs[0]["accuracy_interval_by_length"] == {"64": [9.45, 90.55], "128": [0.0, 79.35]}
    assert shown[2].startswith("high channels by their mean")
    assert shown[2].endswith("34.57")


def response(**values: Any) -> dict[str, Any]:
    row = {"max_seq_length": values["length"], "score": values["score"], "loop": values["loop"]}
    row |= {"loop_share": values["loop"] / values["tokens"], "tokens": values["tokens"]}
    return row | {"distinct": values["distinct"], "finished": values.get("finished", True)}


# -- the tool --------------------------------------------------------------------------------------------


def config(*flags: str) -> DisruptConfig:
    return config_from_args(add_disrupt_args(argparse.ArgumentParser()).parse_args(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "niah_single_1"], "--tasks has 'niah_single_1'; needle has single, multikey"),
        (["--benchmark", "ruler", "--tasks", "single"], "--tasks has 'single'; ruler has niah_single_1"),
        (["--ratio", "0.1", "1"], "--ratio is 1.0; it must be a share between 0 and 1"),
        (["--ratio", "0.1", "0.3", "--mask", "m"], "--mask has the share of its channels; give no --ratio"),
        (["--num-samples", "0"], "--num-samples is 0; it must be at least 1"),
        (["--text-tokens", "1"], "--text-tokens is 1; a window needs at least 2"),
        (["--channel-seed", "-1"], "--channel-seed is -1; it must be 0 or more"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        config(*flags)


def run_tool(*flags: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the tool on the demo's checkpoint."""
    program = [str(ROOT / "tools/disrupt.py"), "--load", str(START), *flags, *demo_model_args()]
    return run_program(*program, world_size=ranks, launcher=False)


@pytest.mark.timeout(200)
def test_the_demo_checkpoint_is_disturbed_on_two_tensor_parallel_ranks(tmp_path):
    flags = ["--lengths", "64", "--tasks", "single", "--num-samples", "8", "--measure-samples", "4"]
    flags += ["--channels", "high", "low", "--ratio", "0.3", "0.02"]
    flags += ["--text-windows", "2", "--text-tokens", "64", "--tensor-model-parallel-size", "2"]
    done = run_tool(*flags, "--output", str(tmp_path), "--html", str(tmp_path / "page.html"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "high 30% by their mean" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["channels"] for run in results["runs"]] == [None, "high", "low", "high", "low"]
    assert [run.get("ratio") for run in results["runs"]] == [None, 0.02, 0.02, 0.3, 0.3]
    plain, _, fewest, high, low = results["runs"]
    assert fewest["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)  # two of 128 channels
    # the start model finds most single needles at a length that it was trained on, not without its highest channels
    assert min(plain["accuracy"], low["accuracy"]) >= 50 > high["accuracy"]
    assert plain["perplexity"] != pytest.approx(high["perplexity"], rel=1e-3)
    assert results["measured"] == {"prompts": 4, "tokens": 256}
    counts = {name: (c["q"], c["k"]) for name, c in results["channels"].items()}  # of 128 and of 64
    assert counts == {
        f"{name} {share}": n for share, n in (("2%", (9, 3)), ("30%", (114, 57))) for name in ("high", "low")
    }
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * 8
    assert "## single, 64 tokens, prompt 1" in (tmp_path / "samples.md").read_text()
    assert (tmp_path / "disruption.png").stat().st_size > 5000
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 1
    assert '<th scope="row">high 30% by their mean</th><td>' in page
    assert "<h4>high 2% by their mean, score " in page


# q/k-layernorm, epsilon and YaRN are what Megatron's own --use-checkpoint-args leaves out
HUGGING_FACE: dict[str, dict[str, Any]] = {"qwen3": {"rms_norm_eps": 1e-2}, "llama-yarn": {}}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("family", HUGGING_FACE)
def test_a_hugging_face_model_is_the_same_model_in_megatron(tmp_path, family):
    folder = tmp_path / "hf"
    make_hf(family, folder, vocab_size=1024, max_position_embeddings=512, **HUGGING_FACE[family])
    to_megatron.convert(folder, tmp_path / "megatron")
    flags = "--benchmark ruler --tasks niah_single_2 --lengths 160 --num-samples 2 --measure-samples 1"
    flags += " --tokens-to-generate 4 --channels high --text-windows 4 --text-tokens 64 --use-checkpoint-args"
    text = ROOT / "docs/method.md"
    tokenizer_flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(SENTENCEPIECE)]
    paths = ["--load", str(tmp_path / "megatron"), "--output", str(tmp_path), "--text", str(text)]
    done = run_program(str(ROOT / "tools/disrupt.py"), *paths, *flags.split(), *tokenizer_flags, launcher=False)
    assert done.returncode == 0, done.stderr
    plain, high = json.loads((tmp_path / "results.json").read_text())["runs"]
    windows = torch.tensor(DemoTokenizer().tokenize(text.read_text())[: 4 * 64]).view(4, 64)
    logits = hf_logits(folder, windows)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten())
    assert plain["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert high["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["niah_single_2"] * 4
