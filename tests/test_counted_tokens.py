"""Which forwards and tokens count for the saliency: padded, packed, weighted; what is said of a loss mask."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_longact import LongActConfig
from tests import ranks, reference
from tests.models import ModelSpec, build, random_tokens, train_step
from tests.ranks import Layout
from tests.runs import cpu, same, take_step, with_longact

SPEC = ModelSpec()


def counted_saliency(length_rule: dict[str, int], lengths: list[int], micro_batch_size: int) -> dict[str, Any]:
    """Padded micro-batches of sequences of given lengths; the padding is garbage that moves activations."""
    built, longact = with_longact(config=LongActConfig(**length_rule))
    tokens = random_tokens(len(lengths), 16, seed=3)
    real = (torch.arange(16)[None] < torch.tensor(lengths)[:, None]).split(micro_batch_size)
    masks = iter(real[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()])
    train_step(
        built,
        tokens,
        micro_batch_size=micro_batch_size,
        before_forward=lambda inputs: longact.set_tokens(next(masks)),
    )
    return {"saliency": cpu(longact.saliency), "rejected": longact.state.rejected}


def naive_counted(keep: list[list[bool]]) -> dict[int, dict[str, Tensor]]:
    built = build(SPEC)
    log = reference.ActivationLog(built.chunks[0])
    train_step(built, random_tokens(len(keep), 16, seed=3), step=False)
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    return {
        n: reference.saliency([a[torch.tensor(k)] for a, k in zip(out, keep, strict=True)], rows, "mean-abs")
        for n, out in log.outputs.items()
    }


@pytest.mark.parametrize(
    "rule", [{}, {"min_context": 8}, {"skip_first_tokens": 3}, {"min_context": 8, "skip_first_tokens": 9}]
)
@pytest.mark.parametrize(
    ("lengths", "micro_batch_size", "layout"),
    [
        ([16, 5, 11, 8], 1, Layout(tp=2)),
        ([16, 5, 11, 8], 4, Layout(tp=2)),
        ([16, 0, 11, 0], 1, Layout()),
        ([16, 5, 11, 0, 0, 8, 0, 0], 2, Layout(pp=2)),
    ],
    ids=["one each", "lengths mixed in a micro-batch", "a rank with empty micro-batches", "some micro-batches empty"],
)
def test_only_tokens_that_count_are_counted(
    rule: dict[str, int], lengths: list[int], micro_batch_size: int, layout: Layout
) -> None:
    keep = [
        [n >= rule.get("min_context", 0) and rule.get("skip_first_tokens", 0) <= i < n for i in range(16)]
        for n in lengths
    ]
    wanted = ranks.run(naive_counted, keep=keep)[0]
    run = {"length_rule": rule, "lengths": lengths, "micro_batch_size": micro_batch_size}
    for result in ranks.run(counted_saliency, **run, layout=layout, world_size=2):
        for layer, parts in wanted.items():
            for part, scores in parts.items():
                torch.testing.assert_close(result["saliency"][layer][part].double(), scores, rtol=2e-5, atol=0)


def forwards() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case in ("plain", "no-grad forwards", "pass repeated", "micro-batches of two"):
        built, longact = with_longact()
        kwargs: dict[str, Any] = {"micro_batch_size": 2} if case == "micro-batches of two" else {}
        if case == "no-grad forwards":
            with torch.no_grad():
                inputs = random_tokens(2, 15, seed=9)
                built.chunks[0](inputs, torch.arange(16).expand(2, 16), torch.ones(1, 1, 16, 16).bool().triu(1))
        if case == "pass repeated":
            take_step(built, longact, step=False)
        take_step(built, longact, **kwargs)
        results[case] = {"saliency": cpu(longact.saliency), "masks": cpu(longact.masks)}
        longact.detach()
    return results


def test_rollouts_and_repeated_passes_do_not_count() -> None:
    results = ranks.run(forwards)[0]
    assert same(results["plain"]["saliency"], results["no-grad forwards"]["saliency"])
    assert same(results["plain"]["saliency"], results["pass repeated"]["saliency"])
    assert same(results["plain"]["masks"], results["micro-batches of two"]["masks"])


def packed_run(named: bool) -> dict[str, Any]:
    """Three sequences and padding in one row, told by packed_seq_params."""
    built, longact = with_longact(config=LongActConfig(skip_first_tokens=2))
    bounds, padded = torch.tensor([0, 6, 14], dtype=torch.int32), torch.tensor([0, 6, 16], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=10,
        max_seqlen_kv=10,
    )
    log = reference.ActivationLog(built.chunks[0])

    def name(inputs: Tensor) -> None:
        if named:
            longact.set_tokens(torch.arange(16)[None] < 9)

    train_step(
        built,
        random_tokens(1, 16),
        forward_kwargs=lambda inputs: {"packed_seq_params": packed},
        before_forward=name,
    )
    keep = torch.tensor([2, 3, 4, 5, 8, *(() if named else (9, 10, 11, 12, 13))])
    rows = reference.channels_of_row(SPEC.heads, SPEC.groups, SPEC.kv_channels)
    wanted = {n: reference.saliency([out[0][keep]], rows, "mean-abs") for n, out in log.outputs.items()}
    return {"saliency": cpu(longact.saliency), "wanted": wanted}


@pytest.mark.parametrize("named", [False, True])
def test_packed_sequences_are_counted_by_their_bounds(named: bool) -> None:
    result = ranks.run(packed_run, named=named)[0]
    for layer, parts in result["wanted"].items():
        for part, scores in parts.items():
            torch.testing.assert_close(result["saliency"][layer][part].double(), scores, rtol=2e-5, atol=0)


def packed_logits(yarn: bool) -> list[Tensor]:
    """Losses of two sequences, apart and packed into one row."""
    model = build(replace(SPEC, yarn=yarn)).chunks[0].module
    tokens = random_tokens(1, 14, seed=4)
    bounds = torch.tensor([0, 6, 14], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=8, max_seqlen_kv=8
    )
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    together = model(inputs, positions, None, labels=labels, packed_seq_params=packed)
    apart = []
    for begin, end in ((0, 6), (6, 14)):
        n = end - begin
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        apart.append(model(inputs[:, begin:end], torch.arange(n)[None], mask, labels=labels[:, begin:end]))
    return [together.detach(), torch.cat(apart, dim=1).detach()]


@pytest.mark.parametrize("yarn", [False, True], ids=["rope", "yarn"])
def test_packed_sequences_do_not_see_each_other(yarn: bool) -> None:
    together, apart = ranks.run(packed_logits, yarn=yarn)[0]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


class Told(logging.Handler):
    """Keeps what LongAct logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("megatron_longact").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("megatron_longact").removeHandler(self)


def warnings_of(mask: str) -> list[str]:
    """Two steps on rows of 12 tokens of prompt, 2 of response and 2 of padding."""
    built, longact = with_longact()
    place = torch.arange(16)[None].expand(1, 16)
    named = {"attention": place < 14, "loss": (place >= 12) & (place < 14), "prompt": place < 12}[mask]
    tokens = random_tokens(4, 16)
    tokens[:, 14:] = 0
    with Told() as messages:
        for _ in range(2):
            train_step(built, tokens, before_forward=lambda inputs: longact.set_tokens(named))
    return [message for message in messages if "set_tokens" in message]


def test_a_loss_mask_in_place_of_attention_tokens_is_noticed_once() -> None:
    said = {mask: ranks.run(warnings_of, mask=mask)[0] for mask in ("attention", "loss", "prompt")}
    assert said["attention"] == said["prompt"] == []
    (warning,) = said["loss"]
    assert "named 8 of 56 tokens that are no padding (14%)" in warning
    assert "loss mask" in warning


def weighted(weights: Any) -> dict[int, dict[str, Tensor]]:
    built, longact = with_longact()
    train_step(built, random_tokens(2, 16), before_forward=lambda inputs: longact.set_tokens(weights))
    return cpu(longact.saliency)


def test_a_token_that_weighs_three_counts_three_times() -> None:
    """Against the sums of bool masks: 3 a + b, where only a is named, or both."""
    first, both_parts = torch.arange(16)[None] < 6, torch.ones(1, 16, dtype=torch.bool)
    a, all_tokens = ranks.run(weighted, weights=first)[0], ranks.run(weighted, weights=both_parts)[0]
    found = ranks.run(weighted, weights=torch.where(first, 3, 1))[0]
    for layer, parts in found.items():
        for part, scores in parts.items():
            wanted = (2 * 6 * a[layer][part] + 16 * all_tokens[layer][part]) / (2 * 6 + 16)
            torch.testing.assert_close(scores, wanted, rtol=2e-6, atol=0)
