"""The needle tasks: exact lengths, disjoint splits, samples that depend on (seed, split, step, index) alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_longact.tasks.needle import (
    KEYS,
    NEEDLE,
    NEEDLE_TASKS,
    NeedleGenerator,
    NeedleTask,
    exact_match,
    reward,
    sentences_of,
)

sentencepiece = pytest.importorskip("sentencepiece")
TOKENIZER_MODEL = Path(__file__).parents[1] / "examples" / "demo" / "tokenizer.model"


class DemoTokenizer:
    """The demo's SentencePiece model with a Megatron tokenizer's method names."""

    def __init__(self) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER_MODEL))

    def tokenize(self, text: str) -> list[int]:
        return self.model.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self.model.decode(list(ids))


@pytest.fixture(scope="module")
def tokenizer() -> DemoTokenizer:
    return DemoTokenizer()


def _needles_in(prompt: str) -> list[tuple[str, str]]:
    before, after = NEEDLE.split("{key}")[0], NEEDLE.split("{key}")[1].split("{value}")[0]
    return [(part.split(after)[0], part.split(after)[1].split(".")[0]) for part in prompt.split(before)[1:]]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("name", list(NEEDLE_TASKS))
@pytest.mark.parametrize("length", [128, 256, 513])
def test_prompt_has_exactly_the_drawn_length_and_all_needles(tokenizer, name, length, split):
    task = NEEDLE_TASKS[name]
    generator = NeedleGenerator(tokenizer, tasks=[name], lengths=[length], split=split, seed=3)
    for index in range(20):
        sample = generator.sample(0, index)
        assert len(sample.prompt_ids) == sample.length == length
        assert sample.prompt == tokenizer.detokenize(list(sample.prompt_ids))
        needles = _needles_in(sample.prompt)
        assert len(needles) == len(sample.depths) == task.num_keys * task.num_values
        asked = sample.prompt.rsplit("does the text give for ", 1)[1].split("?")[0].split(" and ")
        wanted = [value for key, value in needles if key in asked]
        assert sorted(wanted) == sorted(sample.references)
        assert len(sample.references) == task.num_queries * task.num_values
        assert {key for key, _ in needles} <= set(KEYS)


def test_references_follow_the_order_of_the_question_then_of_the_text(tokenizer):
    generator = NeedleGenerator(tokenizer, lengths=[256], seed=0)
    task = NeedleTask("both", num_keys=3, num_values=2, num_queries=2)
    for index in range(20):
        sample = generator.sample(0, index, task=task)
        asked = sample.prompt.rsplit("does the text give for ", 1)[1].split("?")[0].split(" and ")
        needles = _needles_in(sample.prompt)
        assert sample.references == tuple(v for query in asked for key, v in needles if key == query)


def test_samples_depend_on_seed_split_step_and_index_alone(tokenizer):
    def make(**changes):
        return NeedleGenerator(tokenizer, **{"lengths": [128, 192], "split": "train", "seed": 5, **changes})

    first, second = make(), make()
    second.sample(9, 9)
    assert first.sample(2, 3) == second.sample(2, 3)
    others = [make(seed=6).sample(2, 3), make(split="heldout").sample(2, 3), first.sample(3, 3), first.sample(2, 4)]
    assert len({s.prompt for s in [first.sample(2, 3), *others]}) == 5


def test_tasks_lengths_and_depths_are_drawn_over_their_range(tokenizer):
    generator = NeedleGenerator(tokenizer, lengths=[160, 320], seed=1)
    samples = [generator.sample(step, index) for step in range(20) for index in range(20)]
    assert set(Counter(s.task for s in samples)) == set(NEEDLE_TASKS)
    assert min(Counter(s.task for s in samples).values()) > 60
    assert min(Counter(s.length for s in samples).values()) > 150
    depths = [depth for s in samples for depth in s.depths]
    assert all(0 <= depth < 1 for depth in depths)
    assert all(sum(low <= d < low + 0.25 for d in depths) > 0.1 * len(depths) for low in (0, 0.25, 0.5, 0.75))


def test_same_length_draws_one_length_a_step(tokenizer):
    generator = NeedleGenerator(tokenizer, lengths=[128, 256], seed=1, same_length=True)
    per_step = [{generator.sample(step, index).length for index in range(8)} for step in range(20)]
    assert all(len(lengths) == 1 for lengths in per_step)
    assert set().union(*per_step) == {128, 256}


def test_a_length_that_cannot_hold_the_task_is_refused(tokenizer):
    generator = NeedleGenerator(tokenizer, tasks=["multikey"], lengths=[20], seed=0)
    with pytest.raises(ValueError, match=r"needs \d+ tokens .* a length of 20 cannot hold it"):
        generator.sample(0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["nope"]}, "unknown needle task 'nope'"),
        ({"tasks": []}, "at least one task"),
        ({"lengths": []}, "at least one task and one length"),
        ({"split": "test"}, "split is 'test'"),
    ],
)
def test_bad_settings_are_refused(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleGenerator(tokenizer, **{"lengths": [128], "seed": 0, **changes})


@pytest.mark.parametrize("counts", [(1, 1, 2), (0, 1, 0), (2, 0, 1)])
def test_impossible_tasks_are_refused(counts):
    with pytest.raises(ValueError, match="num_"):
        NeedleTask("bad", *counts)


def test_train_and_heldout_share_no_sentence():
    assert not set(sentences_of("train")) & set(sentences_of("heldout"))
    assert len(sentences_of("train")) > 1000
    assert len(sentences_of("heldout")) > 300


def test_reward_counts_right_wrong_and_missing_numbers():
    assert reward(" 12, 56.", ("12", "56")) == 1.0
    assert reward(" 56.", ("12", "56")) == 0.5
    assert reward(" 12, 99.", ("12", "56")) == 1 / 3
    assert reward(" 12, 56, 99, 98.", ("12", "56")) == 0.5
    assert reward(" 12, 12.", ("12",)) == 0.5
    assert reward("", ("12",)) == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" 1234, 5678.", True),
        ("5678 and 1234", True),
        ("1234", False),
        ("1234, 5678, 1111", False),
        ("12345678", False),
    ],
)
def test_exact_match_wants_the_references_and_no_other_number(response, expected):
    assert exact_match(response, ("1234", "5678")) is expected


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(1000, 9999), min_size=1, max_size=4, unique=True))
def test_the_taught_answer_gets_full_reward(values):
    references = tuple(map(str, values))
    answer = " " + ", ".join(references) + "."
    assert reward(answer, references) == 1.0
    assert exact_match(answer, references)


def test_demo_tokenizer_suits_the_tasks(tokenizer):
    model = tokenizer.model
    assert model.unk_id() == 0
    assert (model.bos_id(), model.eos_id(), model.pad_id()) == (1, 2, 3)
    assert all(len(tokenizer.tokenize(f" {value}")) == 1 for value in range(10, 100))
    assert all(len(tokenizer.tokenize(text)) == 1 for key in KEYS for text in (f" {key}", f" {key} is:"))
    ids = [i for text in sentences_of("heldout") for i in tokenizer.tokenize(" " + text)]
    assert ids.count(0) < 0.01 * len(ids)
