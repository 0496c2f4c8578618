"""RULER: samples that can be answered and fit, sources, and scores as the official scripts give them."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wonderwords

from megatron_longact.tasks import ruler
from megatron_longact.tasks.ruler import builtin_questions, words
from megatron_longact.tasks.ruler.generation import largest_fitting
from megatron_longact.tasks.ruler.haystack import split_sentences
from megatron_longact.tasks.ruler.makers import NOISE
from megatron_longact.tasks.ruler.needles import DEPTHS

ROOT = Path(__file__).parents[1]
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


class Words:
    """Tokens are words and punctuation marks."""

    def encode(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)


class Characters:
    """Tokens are bytes."""

    def encode(self, text: str) -> bytes:
        return text.encode()


def generate(task: str, length: int = 4096, count: int = 3, **settings: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"tokenizer": Words(), "seed": 42, **settings}
    return ruler.generate(task, num_samples=count, max_seq_length=length, **given)


def test_the_thirteen_tasks_with_the_official_defaults():
    assert list(ruler.TASKS) == [
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    ]
    tokens = {task.family: task.tokens_to_generate for task in ruler.TASKS.values()}
    assert tokens == {
        "niah": 128,
        "variable_tracking": 30,
        "common_words_extraction": 120,
        "freq_words_extraction": 50,
        "qa": 32,
    }
    kinds = {
        t.name: (t.haystack, t.keys, t.values, t.num_keys, t.num_values, t.num_queries)
        for t in list(ruler.TASKS.values())[:8]
    }
    assert kinds == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    assert tuple(np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int)) == DEPTHS


@pytest.mark.parametrize("length", [1100, 4096, 16384])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_fit_and_use_the_room(task, length):
    samples = generate(task, length)
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    for sample in samples:
        text = sample["input"] + sample["answer_prefix"]
        assert sample["length"] == len(Words().encode(text)) + ruler.TASKS[task].tokens_to_generate
        # the coarsest haystack is a document of some 110 words; each sample differs a little from the one tried first
        assert length - 250 < sample["length"] <= length
        assert sample["length_w_model_temp"] == sample["length"]
        assert all(isinstance(output, str) and output for output in sample["outputs"])
        assert not re.search(r"\{(context|query|type_needle_v|num_v|task_template)\}", text)
        assert sample["others"]["task"] == task
        json.dumps(sample)


@pytest.mark.parametrize("task", [name for name in ruler.TASKS if name.startswith("niah")])
def test_needles(task):
    settings = ruler.TASKS[task]
    for sample in generate(task, 3000, count=5):
        instruction, *_, question = sample["input"].split("\n")
        body = sample["input"][len(instruction) : -len(question)]
        found = NEEDLE.findall(body)
        hidden: dict[str, list[str]] = {}
        for kind, key, value in found:
            assert kind == settings.values
            hidden.setdefault(key, []).append(value)
        single = settings.num_queries * settings.num_values == 1
        kind = settings.values[:-1] if single else settings.values
        asked = question.split(f"special magic {kind} for ")[1].split(" mentioned in")[0]
        keys = re.split(r", and |, ", asked)
        assert len(keys) == settings.num_queries
        assert sorted(sample["outputs"]) == sorted(value for key in keys for value in hidden[key])
        assert len(sample["outputs"]) == settings.num_queries * settings.num_values
        values = [value for own in hidden.values() for value in own]
        assert len(set(values)) == len(values)
        if settings.haystack == "needle":
            assert len(found) > 20
        else:
            assert len(found) == settings.num_keys * settings.num_values
        first = sample["outputs"][0]
        place = sample["input"].index(first)
        assert sample["token_position_answer"] == len(Words().encode(sample["input"][:place]))
        verb = "is" if single else "are"
        assert sample["answer_prefix"] == (
            f" The special magic {kind} for {asked} mentioned in the provided text {verb}"
        )
        assert instruction.startswith("A special" if single else "Some special")


def test_single_needle_reads_like_the_official_one():
    [sample] = generate("niah_single_1", 400, count=1)
    lines = sample["input"].split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[-1].startswith("What is the special magic number for ")
    assert lines[-1].endswith(" mentioned in the provided text?")
    assert Counter(lines[1:-1])[NOISE] == len(lines) - 3
    assert len([line for line in lines if NEEDLE.fullmatch(line)]) == 1


def test_essay_needles_stand_between_sentences_at_many_depths():
    depths = set()
    for sample in generate("niah_single_2", 3000, count=30):
        sentences = split_sentences(sample["input"].split("\n")[1])
        [place] = [i for i, sentence in enumerate(sentences) if NEEDLE.fullmatch(sentence)]
        haystack = len(sentences) - 1
        assert any(int(haystack * depth / 100) == place for depth in DEPTHS)
        depths.add(place)
    assert len(depths) > 10


def test_variable_tracking_is_a_chain_after_an_example():
    for sample in generate("vt", count=4):
        example, body = sample["input"].split("Memorize and track")[1:]
        assert "they are:  " in example  # the template ends with a space, and one comes before the names
        for part, answer in ((example, example.split("they are:  ")[1].split()), (body, sample["outputs"])):
            value = re.search(r"assigned the value (\d{5}) in the text", part)[1]
            chain = [re.search(rf"VAR (\w+) = {value}\n", part)[1]]
            while match := re.search(rf"VAR (\w+) = VAR {chain[-1]} \n", part):
                chain.append(match[1])
            assert chain == answer
            assert len(set(chain)) == 5
            places = [part.index(f"VAR {name} =") for name in chain]
            assert places == sorted(places)
        assert value in sample["answer_prefix"]
        assert sample["answer_prefix"].endswith("5 variables are assigned the value " + value + ", they are: ")
    examples = {s["input"].split("Memorize and track")[1] for s in generate("vt", count=4)}
    assert len(examples) == 4  # other names each time
    assert len({re.sub(r"\b(?!VAR)[A-Z]{3}\b|\d{5}", "", example) for example in examples}) == 1


NUMBERED = r"(\d+)\. (.+?)(?= \d+\. |$)"
"""A word of a list; wonderwords has some with a blank."""


@pytest.mark.parametrize(("length", "repeats"), [(4095, (6, 1)), (4096, (30, 3))])
def test_common_words_are_the_most_common(length, repeats):
    for sample in generate("cwe", length):
        example, body = sample["input"].split("Memorize the ones that appear most often.\n")[1:]
        listed = re.findall(NUMBERED, body.split("\nQuestion")[0])
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, _ in counts.most_common(10)} == set(sample["outputs"])
        assert set(counts.values()) == set(repeats)
        shown = re.findall(NUMBERED, example.split("in the list are: ")[1].split("\nBelow")[0])
        assert len(shown) == 10


@pytest.fixture
def no_wonderwords(monkeypatch):
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    words.word_list.cache_clear()
    yield
    words.word_list.cache_clear()


def test_words_are_those_of_wonderwords():
    """The same that the official scripts load, and by the function that they load them by."""
    load = wonderwords.random_word._get_words_from_text_file
    nouns, adjectives, verbs = (load(f"{kind}list.txt") for kind in ("noun", "adjective", "verb"))
    listed = words.word_list()
    assert (set(listed.nouns), set(listed.adjectives)) == (set(nouns), set(adjectives))
    assert list(listed.plain) == sorted({*nouns, *adjectives, *verbs})
    [sample] = generate("cwe", 4096, count=1)
    assert sample["others"]["words"] == listed.source == f"words of wonderwords {version('wonderwords')}"
    assert set(sample["outputs"]) <= set(listed.plain)
    assert len(listed.many) < 500_000


@pytest.mark.usefixtures("no_wonderwords")
def test_a_long_list_of_common_words_takes_compounds_and_says_so():
    [short], [long] = generate("cwe", 4096, count=1), generate("cwe", 60_000, count=1)
    assert short["others"]["words"] == "built-in words"
    assert long["others"]["words"] == "compounds of the nouns of the built-in words"
    assert set(short["outputs"]) <= set(words.word_list().plain)


@pytest.mark.parametrize("length", [350, 1000, 8192])
def test_frequent_coded_words_are_the_three_most_frequent(length):
    for sample in generate("fwe", length):
        text = sample["input"].split("coded words. ", 1)[1].split("\nQuestion")[0]
        ranked = Counter(text.split(" ")).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(sample["outputs"])
        assert len(ranked) == 4 or ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in sample["outputs"])


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_built_in_questions_have_their_answer_in_a_document(task):
    samples = generate(task, 3000, count=20)
    for sample in samples:
        context, question = sample["input"].rsplit("\n\nQuestion: ", 1)
        documents = re.split(r"\n\nDocument \d+:\n", "\n\n" + context.split("given documents.\n\n", 1)[1])[1:]
        assert any(sample["outputs"][0] in document for document in documents)
        assert sample["outputs"][0] not in question
        assert len(set(documents)) == len(documents)
        assert sample["answer_prefix"] == " Answer:"
    assert len({sample["input"].rsplit("Question: ", 1)[1] for sample in samples}) == 20


def test_built_in_question_sets_are_as_large_as_the_suite_needs():
    articles = builtin_questions.squad()["data"]
    assert sum(len(p["qas"]) for article in articles for p in article["paragraphs"]) >= 500
    assert len(builtin_questions.hotpotqa()) >= 500
    assert all(len(entry["context"]) == 10 for entry in builtin_questions.hotpotqa())


def _digest(task: str) -> str:
    return json.dumps(generate(task, 1100, count=2), sort_keys=True)


def test_samples_depend_on_nothing_but_their_seed_and_index():
    for task in ruler.TASKS:
        random.seed(0)
        state = random.getstate()
        two = generate(task, 1100, count=2)
        assert random.getstate() == state
        random.seed(1)
        assert generate(task, 1100, count=4)[:2] == two
        if not task.startswith("qa"):
            assert generate(task, 1100, count=2, seed=43)[0]["outputs"] != two[0]["outputs"]


def test_samples_do_not_depend_on_the_hash_seed():
    script = "from tests.test_ruler import _digest; from megatron_longact.evaluation import ruler\n"
    script += "print(''.join(_digest(task) for task in ruler.TASKS))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},  # pytest has another, or a random one
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "".join(_digest(task) for task in ruler.TASKS)


@pytest.mark.parametrize("tokenizer", [Words(), Characters()], ids=["words", "characters"])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_length_that_is_too_short_is_refused_with_the_least_one(task, tokenizer):
    with pytest.raises(ValueError, match=rf"RULER's {task} does not fit into 100 tokens.* at least \d+$") as refused:
        generate(task, 100, tokenizer=tokenizer)
    least = int(str(refused.value).split()[-1])
    assert all(sample["length"] <= least for sample in generate(task, least, tokenizer=tokenizer))
    with pytest.raises(ValueError, match=f"at least {least}$"):
        generate(task, least - 1, tokenizer=tokenizer)


@pytest.mark.parametrize("limit", [3, 4, 10, 99, 1000])
def test_the_largest_fitting_size_is_found(limit):
    asked = []

    def length(size):
        asked.append(size)
        return 3 * size

    assert largest_fitting(length, minimum=1, maximum=None, limit=limit) == limit // 3
    assert largest_fitting(length, minimum=1, maximum=20, limit=limit) == min(limit // 3, 20)
    assert largest_fitting(length, minimum=400, maximum=None, limit=limit) is None
    assert max(asked[:-1]) <= 2 * limit


def test_model_templates():
    template = "<user>Some users are {here}: {task_template}</user>"
    [sample] = generate("niah_single_1", 600, count=1, model_template=template)
    # the singular is made in the model's template too
    assert sample["input"].startswith("<user>A users is {here}: A special magic number is")
    assert sample["input"].endswith("mentioned in the provided text?</user>")
    [sample] = generate("vt", count=1, model_template=template)
    assert sample["input"].startswith("<user>Some users are {here}: Memorize and track")
    assert sample["input"].count("<user>") == 1
    [sample] = generate("cwe", count=1, model_template=template)
    assert sample["input"].count("<user>") == 2  # its example stands in the template as well
    [sample] = generate("niah_single_1", 600, count=1, model_template_tokens=50)
    assert sample["length"] <= 550
    assert sample["length_w_model_temp"] == sample["length"] + 50
    with pytest.raises(ValueError, match=r"has no \{task_template\}"):
        generate("vt", model_template="no place")


def test_fewer_tokens_to_generate_leave_more_haystack():
    [usual], [short] = (
        generate("niah_single_1", 400, count=1),
        generate("niah_single_1", 400, count=1, tokens_to_generate=16),
    )
    assert len(short["input"]) > len(usual["input"])
    assert short["length"] <= 400


def test_essays_of_the_user(tmp_path):
    path = tmp_path / "PaulGrahamEssays.json"
    path.write_text(json.dumps({"text": "Owls  fly at\nnight. They sleep by day."}))
    [sample] = generate("niah_single_2", 500, count=1, essays=path)
    body = NEEDLE.sub("", sample["input"].split("\n")[1])
    assert "Owls fly at night. They sleep by day. Owls fly at night." in " ".join(body.split())
    assert sample["others"]["haystack"] == "essays of PaulGrahamEssays.json"
    built_in = generate("niah_single_2", 500, count=1)[0]["others"]["haystack"]
    assert built_in.startswith("built-in prose (pydoc_data.topics of Python 3.")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="is no essays file"):
        generate("niah_single_2", essays=tmp_path / "list.json")
    with pytest.raises(ValueError, match="cannot read the essays"):
        generate("niah_single_2", essays=tmp_path / "none.json")


def test_words_of_the_user(tmp_path):
    for name, line in (("nounlist.txt", "fox\nowl\n"), ("adjectivelist.txt", "red\n"), ("verblist.txt", "run\n\n")):
        (tmp_path / name).write_text(line)
    [sample] = generate("niah_single_1", 500, count=1, words=tmp_path)
    assert re.search(r"for red-(fox|owl) mentioned", sample["input"])
    assert sample["others"]["words"] == f"words of {tmp_path.name}"
    with pytest.raises(ValueError, match=r"nounlist\.txt"):
        generate("cwe", words=tmp_path / "none")


def test_squad_of_the_user(tmp_path):
    def paragraph(context, *qas):
        return {
            "context": context,
            "qas": [{"question": q, "answers": [{"text": t} for t in a], "is_impossible": not a} for q, a in qas],
        }

    birds = [paragraph("Owls are birds.", ("What are owls?", ["birds", "Birds"]), ("Why?", []))]
    fish = [paragraph(f"Fish {i} swims.", (f"What does fish {i} do?", ["swims"])) for i in range(30)]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": birds}, {"paragraphs": fish}]}))
    samples = generate("qa_1", 150, count=2, squad=path)
    assert samples[0]["outputs"] == ["birds", "Birds"]
    assert "Owls are birds." in samples[0]["input"]
    assert samples[1]["input"].endswith("Question: What does fish 0 do?")
    assert "Fish 0 swims." in samples[1]["input"]
    assert samples[0]["others"]["questions"] == "questions of squad.json"
    with pytest.raises(ValueError, match=r"32 samples asked for, but questions of squad\.json are 31"):
        generate("qa_1", 150, count=32, squad=path)
    [everything] = generate("qa_1", 3000, count=1, squad=path)  # more room than documents: all again and again
    assert everything["input"].count("Owls are birds.") > 1
    with pytest.raises(ValueError, match="is no hotpotqa file"):
        generate("qa_2", hotpotqa=path)


def test_hotpotqa_of_the_user(tmp_path):
    context = [[f"Title {i}", [f"First of {i}.", f" Second of {i}."]] for i in range(10)]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([{"question": "What comes first?", "answer": "First", "context": context}]))
    [sample] = generate("qa_2", 400, count=1, hotpotqa=path)
    assert sample["outputs"] == ["First"]
    assert "Title 3\nFirst of 3. Second of 3." in sample["input"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown RULER task 'niah'; known: niah_single_1"):
        generate("niah")
    with pytest.raises(ValueError, match="num_samples is 0"):
        generate("vt", count=0)


# What NVIDIA/RULER's scripts/eval/evaluate.py and eval/synthetic/constants.py gave for the same predictions.
POSTPROCESSED = {
    "": "",
    "  yes \n": "yes",
    "a\tb\x00c": "a\nb\nc",
    "\x00\x1f": "",
    "a\x7fb": "a\x7fb",
    "\x1f x \x01": "x",
    "é\u2028ß\u00a0": "é\u2028ß",
}
SCORES: list[tuple[str, list[str], list[list[str]], float]] = [
    ("vt", ["ABC DEF"], [["abc", "def", "xyz"]], 66.67),
    ("vt", ["ABC", ""], [["abc"], ["abc"]], 50.0),
    ("niah_single_1", ["The number is 12345678."], [["1234567"]], 100.0),  # also within a longer number
    ("niah_multivalue", ["1, 2, 3"], [["1", "2", "3", "4"]], 75.0),
    ("niah_multivalue", ["", "", "x"], [["1"], ["2"], ["3", "x"]], 16.67),
    ("qa_1", ["It was in PARIS"], [["London", "Paris"]], 100.0),
    ("qa_1", ["Pari", "Straße"], [["Paris"], ["STRASSE", "straße"]], 50.0),
    ("qa_2", ["anything"], [[""]], 100.0),
    ("qa_2", [""], [["yes"]], 0.0),
    ("cwe", ["1. a\t2. b"], [["a", "b", "c\nd"]], 66.67),
    ("fwe", ["a\tb"], [["a\nb"]], 100.0),  # a tab is a newline by then
    ("fwe", ["İstanbul"], [["i̇stanbul", "istanbul", "İSTANBUL"]], 66.67),
    ("fwe", ["x"] * 3, [["x"], ["y"], ["x", "y", "z"]], 44.44),
]


def test_postprocessing_is_the_official_one():
    for prediction, expected in POSTPROCESSED.items():
        for task in ("vt", "qa_1"):
            assert ruler.postprocess(task, prediction) == expected
            assert ruler.postprocess(task, expected) == expected


@pytest.mark.parametrize(("task", "predictions", "references", "expected"), SCORES)
def test_scores_are_the_official_ones(task, predictions, references, expected):
    assert ruler.score(task, predictions, references) == expected
    assert ruler.score(task, [ruler.postprocess(task, p) for p in predictions], references) == expected


def test_scores_without_answers_and_without_sense():
    assert ruler.score("vt", [], []) == 0.0
    assert ruler.score("vt", ["x"], [[None]]) == 0.0
    assert ruler.count_nulls("vt", ["", " \x00", "x"]) == 2
    with pytest.raises(ValueError, match="1 predictions, but references for 2"):
        ruler.score("vt", ["x"], [["x"], ["y"]])
    with pytest.raises(ValueError, match="sample 0 has no references"):
        ruler.score("vt", ["x"], [[]])
    with pytest.raises(ValueError, match="unknown RULER task"):
        ruler.score("vt2", ["x"], [["x"]])
