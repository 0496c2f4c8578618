"""JSONL data sets, their environments and mixtures: what is refused, and pure functions of (seed, step, index)."""

import json
import os
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.rl.data.arguments import add_data_args, build_environment, data_config_from_args
from megatron_longact.rl.data.curriculum import Curriculum
from megatron_longact.rl.data.datasets import Dataset
from megatron_longact.rl.data.environment import DatasetEnvironment, Environment, NeedleEnvironment, Task
from megatron_longact.rl.data.mixture import Blend, Mixture
from megatron_longact.rl.data.ruler import RulerEnvironment
from megatron_longact.tasks.chat import PromptEncoder
from megatron_longact.tasks.needle import NeedleGenerator
from tests.tokenizers import DemoTokenizer

GOOD = {"prompt": "one two", "reference": "three", "reward": "exact-match"}
TOKENIZER = DemoTokenizer()
ENCODER = PromptEncoder(TOKENIZER)


def answers_with_its_length(prompt: str, response: str, reference: Any) -> float:
    """A reward of one's own that sees all it is promised."""
    return len(prompt) + len(response) + reference["extra"]


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def numbered(path: Path, n: int, *, words: int = 2) -> Path:
    """Write n prompts; the i-th has words + i words, so that longer ones stand later."""
    return write(path, [{**GOOD, "prompt": "one " * (words + i), "id": i} for i in range(n)])


def load(path: Path, **settings: Any) -> Dataset:
    return Dataset(path, ENCODER, **{"max_prompt_length": 512, **settings})


def test_examples_are_read_with_all_that_stands_there(tmp_path: Path) -> None:
    line = {**GOOD, "prompt": "zwei, drei, \N{SNOWMAN}", "reference": {"extra": 3}, "topic": "counting", "hops": [1, 2]}
    line["reward"] = "tests.test_rl_datasets:answers_with_its_length"
    dataset = load(write(tmp_path / "d.jsonl", [GOOD, b"", line, b"  \r", {**GOOD, "prompt": "last"}]))
    assert len(dataset) == 3
    example = dataset[1]
    assert example.text == line["prompt"]
    assert list(example.tokens) == TOKENIZER.tokenize(line["prompt"])
    assert (example.reference, example.reward) == (line["reference"], line["reward"])
    assert example.metadata == {"topic": "counting", "hops": [1, 2]}
    assert example.source == dataset.source(1) == f"{tmp_path}/d.jsonl:3"
    assert [dataset[i].source[-2:] for i in range(3)] == [":1", ":3", ":5"]
    assert dataset.lengths.tolist() == [len(dataset[i].tokens) for i in range(3)]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b'{"prompt": "x"', "not JSON: Expecting ',' delimiter at column 15$"),
        (b'{"prompt": "x", \r', "not JSON: .* at column"),
        (b"[1, 2]", "must be a JSON object .*, not a list"),
        (b'"text"', "must be a JSON object .*, not a string"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"prompt": "x \\ud800", "reference": "x", "reward": "f1"}', "character 3 is half of a surrogate pair"),
        ({**GOOD, "prompt": [{"role": "user", "content": "\udfff"}]}, "half of a surrogate pair"),
        ({**GOOD, "reward": "numeric", "reference": 10**400}, "must be a finite number"),
        ({**GOOD, "reward": "tests.no_module:f"}, "cannot be imported"),
        ({"reference": "x", "reward": "f1"}, "the field 'prompt' is missing"),
        ({"prompt": "x", "reward": "f1"}, "the field 'reference' is missing"),
        ({"prompt": "x", "reference": "x"}, "the field 'reward' is missing .*--default-reward"),
        ({**GOOD, "prompt": 3}, "'prompt' must be a string or a list of messages, not a number"),
        ({**GOOD, "prompt": None}, "'prompt' must be .* not null"),
        ({**GOOD, "prompt": ""}, "the prompt is empty"),
        ({**GOOD, "prompt": " \n"}, "the prompt is empty"),
        ({**GOOD, "prompt": []}, "the prompt is empty"),
        ({**GOOD, "prompt": ["hello"]}, "message 0 of the prompt must be an object .*, not a string"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "message 0 of the prompt must have a string as its 'content'"),
        ({**GOOD, "prompt": [{"role": "user", "content": "x"}]}, "no chat template; give --chat-template FILE"),
        ({**GOOD, "reward": ["f1"]}, "'reward' must be a string, not a list"),
        ({**GOOD, "reward": "f2"}, "unknown reward 'f2'; known: exact-match"),
        ({**GOOD, "reward": "tests.test_rl_datasets:nothing"}, "has no function 'nothing'"),
        ({**GOOD, "reference": 3}, r"the reference is 3 \(int\); it must be a string"),
        ({**GOOD, "reward": "numeric"}, "the reference is 'three' .* a finite number"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_line(bad: Any, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [GOOD, b"", bad, GOOD])
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_overlong_prompts_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    path = numbered(tmp_path / "d.jsonl", 10)
    lengths = load(path).lengths
    limit = int(lengths[6])
    said = rf"{path}:8: the prompt has {lengths[7]} tokens, and at most {limit} fit .*--drop-overlong-prompts"
    with pytest.raises(ValueError, match=said):
        load(path, max_prompt_length=limit)
    dropped = load(path, max_prompt_length=limit, drop_overlong=True)
    assert (len(dropped), dropped.dropped) == (7, 3)
    assert [dropped[i].metadata["id"] for i in range(7)] == list(range(7))
    assert f"7 prompts of {lengths[0]} to {limit} tokens; 3 dropped" in dropped.summary
    with pytest.raises(ValueError, match=r"no example \(all 10 prompts are too long\)"):
        load(path, max_prompt_length=1, drop_overlong=True)


def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such data set"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="has no example"):
        load(write(tmp_path / "d.jsonl", [b"", b""]))


def test_a_default_reward_serves_lines_without_one(tmp_path: Path) -> None:
    line = {"prompt": "x", "reference": "x"}
    dataset = load(write(tmp_path / "d.jsonl", [line, {**GOOD, "reward": "f1"}]), default_reward="contains-all")
    assert [dataset[i].reward for i in range(2)] == ["contains-all", "f1"]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "d.jsonl", 3)
    dataset = load(path)
    assert dataset[1].metadata == {"id": 1}
    numbered(path, 3, words=1)
    with pytest.raises(RuntimeError, match="was changed while it is in use"):
        dataset[1]


def environment(path: Path, **settings: Any) -> DatasetEnvironment:
    return DatasetEnvironment(load(path), **{"seed": 3, "tasks_per_step": 4, **settings})


def ids(tasks: Sequence[Task]) -> list[int]:
    return [task.metadata["id"] for task in tasks]


def test_each_epoch_goes_through_all_prompts_in_another_order(tmp_path: Path) -> None:
    source = environment(numbered(tmp_path / "d.jsonl", 10))
    drawn = [i for step in range(10) for i in ids(source.training_tasks(step, count=4))]
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_tasks_are_a_function_of_seed_file_step_and_index(tmp_path: Path) -> None:
    path = numbered(tmp_path / "d.jsonl", 50)
    source = environment(path)
    expected = source.training_tasks(7, count=4)
    again = environment(path)
    again.training_tasks(12, count=9)
    assert again.training_tasks(7, count=4) == expected
    assert environment(path, seed=4).training_tasks(7, count=4) != expected
    assert ids(environment(numbered(tmp_path / "e.jsonl", 50)).training_tasks(7, count=4)) != ids(expected)
    task = expected[0]
    assert task.source == f"{path}:{task.metadata['id'] + 1}"
    assert task.name == "d"


def test_further_tasks_of_a_step_change_nothing_before_them_and_are_others(tmp_path: Path) -> None:
    source = environment(numbered(tmp_path / "d.jsonl", 50))
    twelve = source.training_tasks(5, count=12)
    assert source.training_tasks(5, count=4) == twelve[:4]
    assert source.training_tasks(5, count=5, first=4) == twelve[4:9]
    assert source.training_tasks(5, count=3, first=9) == twelve[9:]
    assert len(set(ids(twelve))) == 12
    one_each = [t for i in range(12) for t in source.training_tasks(5, count=1, first=i)]
    assert one_each == twelve


def test_a_curriculum_bounds_prompts_by_step(tmp_path: Path) -> None:
    path = numbered(tmp_path / "d.jsonl", 20)
    lengths = load(path).lengths
    curriculum = Curriculum(((0, int(lengths[4])), (5, int(lengths[9])), (9, 1000)))
    source = environment(path, curriculum=curriculum)
    by_step = [ids(source.training_tasks(step, count=4)) for step in range(20)]
    assert sorted(set(chain(*by_step[:5]))) == list(range(5))
    assert Counter(chain(*by_step[:5])) == Counter(list(range(5)) * 4)  # four epochs of five
    assert set(chain(*by_step[5:9])) <= set(range(10))
    assert set(chain(*by_step[9:])) == set(range(20))
    with pytest.raises(
        ValueError, match=rf"allows at most 1 tokens, but the shortest prompt of {path} has {lengths[0]}"
    ):
        environment(path, curriculum=Curriculum(((0, 1),)))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["5:100"], "must begin at 0"),
        (["0:100", "0:200"], "must begin at 0 and increase"),
        (["0:100", "9:1", "3:2"], "must begin at 0 and increase"),
        (["0:0"], "must be positive"),
        (["0"], "--curriculum 0: give STEP:LENGTH pairs"),
        (["0:many"], "--curriculum 0:many: give STEP:LENGTH pairs"),
        (["0:-5"], "give STEP:LENGTH pairs"),
    ],
)
def test_curricula_that_make_no_sense_are_refused(pairs: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Curriculum.parse(pairs)


def test_the_limit_of_a_step() -> None:
    curriculum = Curriculum.parse(["0:10", "5:20"])
    assert [curriculum.limit(step) for step in (0, 4, 5, 99)] == [10, 10, 20, 20]
    assert Curriculum().limit(3) is None


def test_heldout_tasks_are_grouped_by_edges_stated_length_or_powers_of_two(tmp_path: Path) -> None:
    path = numbered(tmp_path / "d.jsonl", 12)
    lengths = load(path).lengths.tolist()
    plain = environment(path)
    for length in plain.heldout_lengths:
        group = ids(plain.heldout_tasks(length, count=100))
        assert group == [i for i, n in enumerate(lengths) if length // 2 < n <= length]
    edges = (lengths[2], lengths[11])
    by_edges = environment(path, length_edges=edges)
    assert by_edges.heldout_lengths == edges
    assert ids(by_edges.heldout_tasks(edges[0], count=100)) == [0, 1, 2]
    assert ids(by_edges.heldout_tasks(edges[1], count=4)) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match=rf"{path}:12: the prompt has {lengths[11]} tokens, more than the last"):
        _ = environment(path, length_edges=(lengths[10],)).heldout_lengths
    stated = write(tmp_path / "s.jsonl", [{**GOOD, "id": i, "length": n} for i, n in enumerate([4096, 8192, 4096])])
    by_statement = environment(stated)
    assert by_statement.heldout_lengths == (4096, 8192)
    assert ids(by_statement.heldout_tasks(4096, count=9)) == [0, 2]
    words = write(tmp_path / "w.jsonl", [{**GOOD, "length": "long"}, {**GOOD, "length": True}])
    n = len(TOKENIZER.tokenize(GOOD["prompt"]))
    assert environment(words).heldout_lengths == (1 << (n - 1).bit_length(),)


def test_scores_call_the_reward_of_the_line(tmp_path: Path) -> None:
    own = {**GOOD, "reference": {"extra": 0.5}, "reward": "tests.test_rl_datasets:answers_with_its_length"}
    lines = [GOOD, own, {**GOOD, "reward": "f1"}]
    source = environment(write(tmp_path / "d.jsonl", [{**line, "id": i} for i, line in enumerate(lines)]))
    exact, mine, overlap = sorted(source.training_tasks(0, count=3), key=lambda task: task.metadata["id"])
    assert (source.score(exact, " three").reward, source.score(exact, "three four").reward) == (1, 0)
    assert source.score(exact, "three").correct
    assert source.score(mine, "1234").reward == len("one two") + 4 + 0.5
    half_right = source.score(overlap, "three four")
    assert half_right.reward == pytest.approx(2 / 3)
    assert not half_right.correct
    assert environment(source._dataset.path, correct_reward=0.5).score(overlap, "three four").correct


def needles(curriculum: Curriculum | None = None, **settings: Any) -> NeedleEnvironment:
    given = {"names": (), "lengths": (128, 192), "heldout_lengths": (160, 96), "seed": 5, **settings}
    return NeedleEnvironment(TOKENIZER, curriculum=curriculum, **given)


def test_the_needle_environment_draws_what_the_generator_draws() -> None:
    source = needles()
    generator = NeedleGenerator(TOKENIZER, lengths=(128, 192), seed=5)
    assert [t.prompt for t in source.training_tasks(3, count=6)] == [
        generator.sample(3, i).prompt_ids for i in range(6)
    ]
    assert source.training_tasks(3, count=2, first=4) == source.training_tasks(3, count=6)[4:]
    assert source.heldout_lengths == (160, 96)
    measured_only = needles(lengths=())
    assert measured_only.heldout_tasks(96, count=5) == source.heldout_tasks(96, count=5)
    assert {len(t.prompt) for t in measured_only.training_tasks(0, count=16)} == {96, 160}


def test_a_curriculum_bounds_needle_prompts_too() -> None:
    source = needles(Curriculum(((0, 150), (2, 500))))
    assert {len(t.prompt) for step in (0, 1) for t in source.training_tasks(step, count=16)} == {128}
    assert source.training_tasks(2, count=16) == needles().training_tasks(2, count=16)
    assert {len(t.prompt) for t in source.heldout_tasks(160, count=2)} == {160}
    with pytest.raises(ValueError, match="allows at most 100 tokens, but the shortest of the lengths is 128"):
        needles(Curriculum(((0, 100),)))


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (5, 1), (1,), (1, 1e-3)])
def test_a_blend_keeps_to_its_weights(weights: tuple[float, ...]) -> None:
    blend = Blend(weights)
    drawn = [blend[t] for t in range(500)]
    for part, weight in enumerate(weights):
        numbers = [number for p, number in drawn if p == part]
        assert numbers == list(range(len(numbers)))
        for t in range(1, 501):
            count = sum(p == part for p, _ in drawn[:t])
            assert abs(count - t * weight / sum(weights)) < 1
    assert Blend(weights)[499] == drawn[499]


def test_a_mixture_goes_through_each_data_set_in_epochs_of_its_own(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 6), numbered(tmp_path / "b.jsonl", 4)
    mixture = Mixture([(environment(a), 3), (environment(b), 1), (needles(), 1)], heldout=[needles()], tasks_per_step=5)
    tasks = [task for step in range(8) for task in mixture.training_tasks(step, count=5)]
    assert Counter(task.name if task.name in "ab" else "needle" for task in tasks) == {"a": 24, "b": 8, "needle": 8}
    for name, size in (("a", 6), ("b", 4)):
        drawn = ids([task for task in tasks if task.name == name])
        for i in range(0, len(drawn), size):
            assert sorted(drawn[i : i + size]) == list(range(size))
    further = mixture.training_tasks(2, count=12)
    assert further[:5] == tasks[10:15]
    assert mixture.training_tasks(2, count=5, first=7) == further[7:]
    for task in tasks[:5]:
        right = "three" if task.source else ", ".join(task.reference.reference)
        assert mixture.score(task, right).correct
        assert not mixture.score(task, "4, 5").correct


def test_parts_of_a_mixture_have_their_own_curricula_and_mixtures_nest(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 10), numbered(tmp_path / "b.jsonl", 10)
    short = Curriculum(((0, int(load(a).lengths[1])), (4, 1000)))
    inner = Mixture([(environment(a, curriculum=short), 1)], heldout=[needles()], tasks_per_step=1)
    mixture = Mixture([(inner, 1), (environment(b), 1)], heldout=[environment(b), inner], tasks_per_step=4)
    early = [task for step in range(4) for task in mixture.training_tasks(step, count=4)]
    assert set(ids([t for t in early if t.name == "a"])) == {0, 1}
    assert len(set(ids([t for t in early if t.name == "b"]))) == 8
    later = [task for step in range(4, 14) for task in mixture.training_tasks(step, count=4)]
    assert set(ids([t for t in later if t.name == "a"])) == set(range(10))
    assert all(mixture.score(task, "three").correct for task in early)
    assert {96, 160} <= set(mixture.heldout_lengths)
    [task] = mixture.heldout_tasks(96, count=1)
    assert len(task.prompt) == 96


def test_heldout_sources_take_turns_at_each_length(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{**GOOD, "length": 96, "id": i} for i in range(2)])
    b = write(tmp_path / "b.jsonl", [{**GOOD, "length": n, "id": n} for n in (96, 512)])
    mixture = Mixture([(needles(), 1)], heldout=[environment(a), environment(b), needles()], tasks_per_step=1)
    assert mixture.heldout_lengths == (96, 160, 512)
    tasks = mixture.heldout_tasks(96, count=6)
    assert [t.name if t.source else "needle" for t in tasks] == ["a", "b", "needle", "a", "needle", "needle"]
    assert [t.name for t in mixture.heldout_tasks(512, count=6)] == ["b"]
    longest = {**GOOD, "prompt": "one " * 200}
    c = environment(write(tmp_path / "c.jsonl", [GOOD, longest]))
    assert needles().longest_prompt == mixture.longest_prompt == 192  # to train on; 160 held out
    nested = Mixture([(needles(), 1)], heldout=[mixture, c], tasks_per_step=1)
    assert nested.longest_prompt == c.longest_prompt == max(len(task.prompt) for task in c.training_tasks(0, count=2))
    assert c.longest_prompt > 192


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_make_no_sense_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        Blend([1, weight])


def parse(*flags: str, chat_template: str | None = None) -> Namespace:
    return add_data_args(ArgumentParser()).parse_args(flags, Namespace(chat_template=chat_template))


def test_flags_become_an_environment(tmp_path: Path) -> None:
    train, heldout = numbered(tmp_path / "a:b.jsonl", 8), numbered(tmp_path / "held.jsonl", 3)
    flags = ("--train-data", f"{train}:0.5", "needle:1.5", "--heldout-data", str(heldout))
    config = data_config_from_args(parse(*flags, "--curriculum", "0:150", "--heldout-length-edges", "16", "32"))
    assert config.train == ((str(train), 0.5), ("needle", 1.5))
    said: list[str] = []
    built = build(config, said)
    tasks = built.training_tasks(0, count=8)
    assert Counter(bool(task.source) for task in tasks) == {True: 2, False: 6}
    assert {len(t.prompt) for t in tasks if not t.source} == {128}  # the curriculum holds for needles too
    assert set(built.heldout_lengths) <= {16, 32}
    assert [line.split(":")[-1].split(" tokens")[0].split(" of ")[0] for line in said] == [" 8 prompts", " 3 prompts"]


def test_a_name_that_exists_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run:12", "held.jsonl", "needle:2"):
        numbered(tmp_path / name, 3)
    only = data_config_from_args(parse("--train-data", "run:12", "needle:2:3", "--heldout-data", "held.jsonl"))
    assert only.train == (("run:12", 1.0), ("needle:2", 3.0))
    assert not only.remarks
    for name in ("run", "needle"):
        numbered(tmp_path / name, 3)
    flags = ("--train-data", "run:12", "run:+12", "needle", "needle:2", "--heldout-data", "held.jsonl")
    both = data_config_from_args(parse(*flags))
    assert both.train == (("run:12", 1.0), ("run", 12.0), ("needle", 1.0), ("needle:2", 1.0))
    said: list[str] = []
    build(both, said)
    assert said[:3] == [
        "--train-data run:12 is the file of this name; run with this weight would be run:+12",
        "--train-data needle:2 is the file of this name; needle with this weight would be needle:+2",
        "needle stands for the needle tasks; the file of this name would be ./needle",
    ]


def build(config: Any, said: list[str] | None = None) -> Environment:
    return build_environment(
        config,
        TOKENIZER,
        needles=needles,
        ruler=lambda encoder, names, curriculum: ruler_tasks(names=names, curriculum=curriculum),
        max_prompt_length=64,
        prompts_per_step=8,
        seed=5,
        say=(said if said is not None else []).append,
    )


def test_without_data_flags_it_is_the_needle_environment() -> None:
    config = data_config_from_args(parse())
    assert config.made == ("needle",)
    assert not config.pass_at.samples
    built = build(config)
    assert isinstance(built, NeedleEnvironment)
    assert built.training_tasks(4, count=3) == needles().training_tasks(4, count=3)


def test_without_held_out_data_nothing_is_measured(tmp_path: Path) -> None:
    train = str(numbered(tmp_path / "a.jsonl", 8))
    config = data_config_from_args(parse("--train-data", train))
    assert not config.made
    built = build(config)
    assert built.heldout_lengths == ()
    assert len(built.training_tasks(0, count=8)) == 8
    assert build(data_config_from_args(parse("--train-data", train, "needle"))).heldout_lengths


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train-data", "{a}", "--heldout-data", "{a}"), "--heldout-data .*a.jsonl is in --train-data as well"),
        (("--train-data", "nowhere.jsonl:2"), "--train-data nowhere.jsonl: no such file"),
        (("--train-data", "ruler:vt,niah"), "unknown RULER task 'niah'; known: niah_single_1"),
        (("--eval-prose-windows", "-1"), "--eval-prose-windows is -1; it must be 0 or more"),
        (("--train-data", "{a}:x", "--heldout-data", "{b}"), "--train-data .*a.jsonl:x: no such file"),
        (("--heldout-data", "nowhere.jsonl"), "--heldout-data nowhere.jsonl: no such file"),
        (("--train-data", "{a}:0", "--heldout-data", "{b}"), "the weight is 0.0; it must be positive"),
        (("--train-data", "{a}", "{a}:2", "--heldout-data", "{b}"), "names .*a.jsonl more than once"),
        (("--heldout-length-edges", "8", "8"), "must be positive and increase"),
        (("--curriculum", "8"), "STEP:LENGTH"),
        (("--default-reward", "f2"), "unknown reward 'f2'"),
        (("--correct-reward", "nan"), "--correct-reward is nan"),
        (("--eval-samples", "-1"), "--eval-samples is -1"),
        (("--eval-samples", "4", "--eval-pass-at", "8"), "--eval-pass-at 8 must lie between 1 and --eval-samples 4"),
        (("--eval-pass-at", "1"), "need --eval-samples"),
        (("--eval-samples", "4", "--eval-temperature", "0"), "--eval-temperature is 0.0"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 2), numbered(tmp_path / "b.jsonl", 2)
    with pytest.raises(ValueError, match=said) as caught:
        data_config_from_args(parse(*(flag.format(a=a, b=b) for flag in flags)))
    assert "\n" not in str(caught.value)


def test_a_relative_and_an_absolute_name_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = numbered(tmp_path / "a.jsonl", 2)
    with pytest.raises(ValueError, match="in --train-data as well"):
        data_config_from_args(parse("--train-data", str(a), "--heldout-data", os.path.join(".", "a.jsonl")))


def test_a_bad_line_in_any_data_set_ends_the_build(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 2), write(tmp_path / "b.jsonl", [GOOD, {**GOOD, "prompt": ""}])
    config = data_config_from_args(parse("--train-data", str(a), "--heldout-data", str(b)))
    with pytest.raises(ValueError, match=rf"{b}:2: the prompt is empty"):
        build(config)


def ruler_tasks(**settings: Any) -> RulerEnvironment:
    given = {"names": ("niah_single_2", "vt", "qa_1"), "lengths": (1500, 2000), "heldout_lengths": (2500,), "seed": 5}
    return RulerEnvironment(ENCODER, response_length=32, **{**given, **settings})


def test_ruler_tasks_are_rulers_own_and_training_and_held_out_ones_have_nothing_in_common() -> None:
    source, again = ruler_tasks(), ruler_tasks()
    again.training_tasks(9, count=2)
    tasks = source.training_tasks(3, count=12)
    assert again.training_tasks(3, count=8, first=4) == tasks[4:]
    assert source.training_tasks(4, count=12) != tasks != ruler_tasks(seed=6).training_tasks(3, count=12)
    assert {task.name for task in tasks} == {"niah_single_2", "vt", "qa_1"}
    lengths = [len(task.prompt) + 32 for task in tasks]
    assert all(any(0.75 * limit < length <= limit for limit in (1500, 2000)) for length in lengths)
    assert min(lengths) <= 1500 < max(lengths)
    heldout = source.heldout_tasks(2500, count=6)
    assert [task.name for task in heldout] == ["niah_single_2", "vt", "qa_1"] * 2
    assert source.heldout_tasks(2500, count=3) == heldout[:3]
    assert all(1900 < len(task.prompt) + 32 <= 2500 for task in heldout)
    assert max(len(task.prompt) for task in heldout) <= source.longest_prompt == 2500 - 32
    assert not {task.reference for task in heldout} & {task.reference for task in tasks}
    hay, straw = (
        TOKENIZER.detokenize(list(next(t.prompt for t in some if t.name == "niah_single_2"))).split(".")
        for some in (tasks, heldout)
    )
    assert len(set(hay) & set(straw)) <= 3  # those of the question
    short = ruler_tasks(curriculum=Curriculum(((0, 1500),)))
    assert max(len(task.prompt) for task in short.training_tasks(0, count=6)) <= 1468


def test_ruler_may_be_named_among_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = numbered(tmp_path / "a.jsonl", 8)
    config = data_config_from_args(parse("--train-data", str(train), "ruler:vt,qa_1:3", "--heldout-data", "ruler:qa_2"))
    assert config.train == ((str(train), 1.0), ("ruler:vt,qa_1", 3.0))
    assert config.made == ("ruler:vt,qa_1", "ruler:qa_2")
    built = build(config)
    tasks = built.training_tasks(0, count=8)
    assert Counter(task.name == "a" for task in tasks) == {True: 2, False: 6}
    assert {task.name for task in tasks} == {"a", "vt", "qa_1"}
    assert {task.name for task in built.heldout_tasks(2500, count=3)} == {"qa_2"}
    assert built.heldout_lengths == (2500,)
    only = build(data_config_from_args(parse("--train-data", "ruler:niah_single_1")))
    assert [task.name for task in only.heldout_tasks(2500, count=1)] == ["niah_single_1"]


def test_ruler_tasks_are_scored_as_ruler_scores() -> None:
    source = ruler_tasks(names=("niah_multivalue", "qa_1"), heldout_lengths=(2000,), lengths=())
    many, asked = source.heldout_tasks(2000, count=2)
    half = source.score(many, f" {many.reference[0]} and {many.reference[2]}.")
    assert (half.reward, half.correct) == (0.5, False)
    assert source.score(many, ", ".join(many.reference)).correct
    assert source.score(asked, f"It is {asked.reference[0].upper()}!").correct


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"names": ("niah_single_9",)}, "unknown RULER task 'niah_single_9'; known: niah_single_1"),
        ({"names": ("vt",), "lengths": (300,)}, "RULER's vt does not fit into 300 tokens"),
        ({"curriculum": Curriculum(((0, 100),))}, "allows at most 100 tokens, but the shortest of the lengths is 1500"),
    ],
)
def test_ruler_tasks_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ruler_tasks(**settings)
