"""InfiniteBench: prompts, labels and scores as its own scripts have them, and its files and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.evaluation import infinitebench
from megatron_longact.evaluation.scoring import checked_predictions
from megatron_longact.tasks.benchmarks import benchmark_from
from megatron_longact.tasks.infinitebench import scoring

OPTIONS = ["load", "save", "merge", "split"]
BOOK = {"context": "A {b}ook.", "input": "Who?", "options": OPTIONS}
PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "passkey": (BOOK, "There is an important info hidden", "\n\nA {b}ook.\n\nWho?\n\nThe pass key is"),
    "number_string": (BOOK, "There is an important info", "there.\n\nA {b}ook.\n\nWho?\n\nThe sequence of digits is"),
    "kv_retrieval": (BOOK, "Extract the value", "JSON object below.\n\nA {b}ook.\n\nWho?"),
    "longdialogue_qa_eng": (
        BOOK,
        "Below is a dialogue script where one random",
        "\n\nA {b}ook.\n\nThe name that has been replaced with $$MASK$$ is likely",
    ),
    "longbook_sum_eng": (BOOK, "Summarize the book below.\n\nA", "\n\nA {b}ook.\n\nSummary:"),
    "longbook_choice_eng": (
        BOOK,
        "Read the book and answer the question.\n\nA {b}ook.\n\nQuestion: Who?\nA. load\nB. save\n",
        "C. merge\nD. split\n\nThe letter of the correct answer is",
    ),
    "longbook_qa_eng": (BOOK, "Read the book and answer the question. Be very", "ook.\n\nQuestion: Who?\nAnswer:"),
    "longbook_qa_chn": (BOOK, "阅读以下书籍然后回答问题。\n\nA", "ook.\n\n问题：Who?\n答案："),  # noqa: RUF001
    "math_find": (
        {"context": "[1, 2]", "input": "Give a number. The second Largest number of the list of all is: "},
        "What is the second largest number of the list in the following list?\n\n[1, 2]\n\nGive",
        "of all is: ",
    ),
    "math_calc": ({"context": "1 + 2"}, "Let us calculate the intermediate", "\n\nExpression: 1 + 2\nValues:"),
    "code_run": (
        {"context": "def func_1(x): ...", "input": "What do func_x(1), func_1(-2) and func_3(4) return?"},
        "There is a function called func_1 in the following Python code.\n\ndef",
        "exact value of func_1(-2). The value of func_1(-2) is",
    ),
    "code_debug": (BOOK, "Following is a Python code where", "Options:\nA. load\nB. save\nC. merge\nD. split\n\n"
        "The correct option is:"),
}  # fmt: skip


def test_there_are_the_twelve_tasks_with_their_numbers_of_tokens() -> None:
    assert {name: task.tokens_to_generate for name, task in infinitebench.TASKS.items()} == {
        "passkey": 6,
        "number_string": 12,
        "kv_retrieval": 50,
        "longdialogue_qa_eng": 40,
        "longbook_sum_eng": 1200,
        "longbook_choice_eng": 40,
        "longbook_qa_eng": 40,
        "longbook_qa_chn": 40,
        "math_find": 3,
        "math_calc": 30000,
        "code_run": 5,
        "code_debug": 5,
    }


@pytest.mark.parametrize("task", infinitebench.TASKS)
def test_prompts_read_as_those_for_open_models(task: str) -> None:
    item, begin, end = PROMPTS[task]
    prompt = infinitebench.build_prompt(task, item)
    assert prompt.startswith(begin)
    assert prompt.endswith(end)
    renamed = {"content": "another"} | item
    assert infinitebench.build_prompt(task, renamed) == (
        prompt.replace("A {b}ook.", "another") if task in ("passkey", "number_string", "kv_retrieval") else prompt
    )
    for name in item:
        if name != "options" or task in scoring.CHOICES:
            if name == "input" and task in ("longdialogue_qa_eng", "longbook_sum_eng", "code_debug"):
                continue
            with pytest.raises(ValueError, match=f"has no '{name}'"):
                infinitebench.build_prompt(task, {other: item[other] for other in item if other != name})


def test_what_no_prompt_can_be_made_of_is_named() -> None:
    for task, item, said in (
        ("passkeys", BOOK, "unknown InfiniteBench task 'passkeys'; known: passkey, "),
        ("code_debug", BOOK | {"options": OPTIONS[:3]}, "has 3 options; it needs 4"),
        ("code_run", BOOK, "names no call such as"),
        ("math_find", BOOK, "does not say 'The ... of'"),
    ):
        with pytest.raises(ValueError, match=said):
            infinitebench.build_prompt(task, item)


def test_the_middle_is_cut_out_as_by_the_official_slices() -> None:
    for length in range(9):
        for limit in range(1, 9):
            ids = list(range(length))
            official = ids[0 : limit // 2] + ids[-limit // 2 :] if length > limit else ids
            assert infinitebench.truncate(ids, limit) == official


def test_labels() -> None:
    assert infinitebench.label("passkey", {"answer": ["71432"]}) == ["71432"]
    assert infinitebench.label("kv_retrieval", {"answer": "c1-4b"}) == "c1-4b"
    for answer in ("merge", ["merge"], ["merge", "C"]):
        assert infinitebench.label("code_debug", {"answer": answer, "options": OPTIONS}) == ["merge", "C"]
    assert infinitebench.label("longbook_choice_eng", {"answer": ["else", "B"]}) == ["else", "B"]
    for wrong in ("else", ["load", "save"], []):
        with pytest.raises(ValueError, match="none of its 4 options"):
            infinitebench.label("code_debug", {"answer": wrong, "options": OPTIONS})


# What the official compute_scores.py gave for the same predictions.
SCORES: list[tuple[str, str, Any, float]] = [
    ("passkey", "is 71432. Remember 9", ["71432"], 1),
    ("passkey", "It is 9 or 71432", "71432", 0),
    ("passkey", "-71432", "71432", 1),  # signs are not seen
    ("passkey", "none", "", 1),
    ("number_string", "３ 007", ["007"], 1),  # only 0 to 9 are digits  # noqa: RUF001
    ("number_string", "7", ["007"], 0),
    ("kv_retrieval", 'The value is: "a1-b2".', "a1-b2", 1),
    ("kv_retrieval", "xa1-b2", "a1-b2", 0),
    ("kv_retrieval", "a1-b2", ["a1-b2"], 0),  # a list is never found
    ("longdialogue_qa_eng", "I think: Ace!", ["ACE", "ACE ROTHSTEIN"], 1),
    ("longdialogue_qa_eng", "Rothstein", ["ACE", "ROTHSTEIN"], 0),  # only the first name counts
    ("longdialogue_qa_eng", "ACE ROTHSTEIN", ["ACE ROTHSTEIN"], 0),  # two words are never one
    ("longbook_choice_eng", "", ["merge", "C"], 0),
    ("longbook_choice_eng", " C, I think", ["merge", "C"], 1),
    ("longbook_choice_eng", "Because of C", ["merge", "C"], 0),  # B
    ("longbook_choice_eng", "merge", ["merge", "C"], 1),
    ("longbook_choice_eng", "the answer is: C", ["merge", "C"], 1),
    ("longbook_choice_eng", "the answer is:C", ["merge", "C"], 0),  # the character behind the prefix is passed over
    ("longbook_choice_eng", "the answer is merge", ["merge", "C"], 1),
    ("longbook_choice_eng", "my answer: 'D' or C", ["merge", "C"], 0),
    ("longbook_choice_eng", "it must be C or D", ["merge", "C"], 1),
    ("longbook_choice_eng", "not BCD but C", ["merge", "C"], 0),  # "BCD" is taken for the answer
    ("longbook_choice_eng", "the answer is", ["merge", "C"], 0),
    ("longbook_qa_eng", "The Peyton, a doctor", ["peyton"], 2 / 3),
    ("longbook_qa_eng", "an apple", ["an", "apple pie"], 2 / 3),
    ("longbook_qa_eng", "a b", "xb", 1),  # one string: letter by letter
    ("longbook_qa_eng", "", ["x"], 0),
    ("longbook_qa_chn", "田立帆，商 老太。", ["田立帆商"], 0.8),  # noqa: RUF001
    ("longbook_sum_eng", "The cat sat.\nThe dog ran.", ["A cat sat", "the dog ran the cat sat"], 1),
    ("longbook_sum_eng", "the cat", "the dog", 0.5),
    ("longbook_sum_eng", "cats", ["cat"], 0),  # no stemming
    ("longbook_sum_eng", "", ["cat"], 0),
    ("math_find", "It is 88.", [88], 1),
    ("math_find", "7.50 or 3", 7.5, 1),
    ("math_find", "12", 12.0, 1),
    ("math_find", "-5", -5, 0),
    ("math_find", "none", 3, 0),
    ("math_calc", "[1, 4, 8, 9]", [1, 4, 7, 9], 0.5),
    ("math_calc", "1 4", [[1, 4, 8, 9]], 0.5),
    ("math_calc", "1, -3", [1, -3], 0.5),
    ("math_calc", "none", [1], 0),
    ("code_run", "func_1(2) is `24`.", [24], 1),
    ("code_run", "the value: -3", -3, 1),
    ("code_run", "24 or so", [24], 0),
    ("code_run", "1_000", 1000, 1),
    ("code_run", "24)", 24, 0),
    ("code_run", "", 24, 0),
    ("code_debug", "B. save", ["save", "B"], 1),
    ("code_debug", "B: it is", ["save", "B"], 1),
    ("code_debug", "B", ["save", "B"], 0),
    ("code_debug", "The answer is: 'B'", ["save", "B"], 1),
    ("code_debug", "The answer is:B", ["save", "B"], 0),
    ("code_debug", "The correct option is: B", ["save", "B"], 1),
    ("code_debug", "The error is: save_all", ["save", "B"], 1),
    ("code_debug", "The answer: Because", ["save", "B"], 1),
    ("code_debug", "answer: A. The answer is: B", ["save", "B"], 1),  # the order of prefixes, not of the text
    ("code_debug", "The answer is:", ["save", "B"], 0),
]  # fmt: skip


@pytest.mark.parametrize(("task", "prediction", "label", "expected"), SCORES)
def test_scores_are_the_official_ones(task: str, prediction: str, label: Any, expected: float) -> None:
    found = infinitebench.score(task, prediction, label)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, abs=1e-12)


def test_what_stops_the_official_script_is_wrong_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert infinitebench.score("math_find", "7.5", 7) == 0
    assert infinitebench.score("math_calc", "9" * 5000, [1]) == 0
    for task, label in (("math_find", "x"), ("math_calc", []), ("math_calc", 3)):
        with pytest.raises(ValueError, match="as its label"):
            infinitebench.score(task, "1", label)
    with pytest.raises(ValueError, match="unknown InfiniteBench task"):
        infinitebench.score("kv", "1", "1")
    scoring._rouge.cache_clear()
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        infinitebench.score("longbook_sum_eng", "a", ["a"])


def test_the_figure_of_a_task_is_the_mean_share() -> None:
    rows = [{"pred": "1", "label": ["1"]}, {"prediction": "2", "pred": "1", "ground_truth": "1"}, {"score": 0.25}]
    assert infinitebench.aggregate("passkey", rows) == pytest.approx(1.25 / 3)
    with pytest.raises(ValueError, match="no predictions"):
        infinitebench.aggregate("passkey", [])
    with pytest.raises(ValueError, match="has no 'ground_truth' or 'label'"):
        infinitebench.aggregate("passkey", [{"prediction": "1"}])


class Letters:
    """Tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def data_of(folder: Path, **files: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for task, items in files.items():
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n")
    return folder


def passkeys(count: int) -> list[dict[str, Any]]:
    return [{"context": f"沙 {i} " * 90, "input": "Which?", "answer": [str(i)], "id": 7} for i in range(count)]


def test_files_are_asked_item_by_item_and_cut_in_the_middle(tmp_path: Path) -> None:
    data = data_of(tmp_path / "d", passkey=passkeys(40), kv_retrieval=[BOOK | {"answer": ["x"]}])
    tasks = ("passkey", "kv_retrieval")
    settings = {"data": data, "tasks": tasks, "model_template": "<u>{task_template}</u>", "tokens_to_generate": 20}
    groups = benchmark_from("infinitebench", settings).samples(Letters(), positions=500)
    assert [(group.name, len(group.ids)) for group in groups] == [("passkey", 32), ("passkey", 8), ("kv_retrieval", 1)]
    sample = groups[1].make()[-1]
    whole = infinitebench.build_prompt("passkey", passkeys(40)[39]).encode()
    room = 500 - 20 - len("<u></u>")
    assert bytes(list(sample.tokens)) == b"<u>" + bytes(infinitebench.truncate(whole, room)) + b"</u>"
    assert sample.id == groups[1].ids[-1] == ("passkey", 39)
    assert sample.answered("39") == {"task": "passkey", "id": 39, "prediction": "39", "ground_truth": ["39"]}
    [alone] = groups[2].make()
    assert alone.answered("x")["ground_truth"] == "x"  # else it would never be found
    assert alone.tokens_to_generate == 20
    first = benchmark_from("infinitebench", settings | {"num_samples": 1, "keep_inputs": True})
    assert [len(group.ids) for group in first.samples(Letters(), positions=9000)] == [1, 1]
    assert first.samples(Letters(), positions=9000)[0].make()[0].answered("")["input"].endswith("The pass key is")


def test_folders_that_cannot_be_asked_are_named(tmp_path: Path) -> None:
    def asked(data: Path | None, *tasks: str, positions: int = 9000) -> None:
        settings = {"data": data, "tasks": tasks or tuple(infinitebench.TASKS)}
        benchmark_from("infinitebench", settings).samples(Letters(), positions=positions)

    data = data_of(tmp_path / "d", passkey=passkeys(1), math_find=[BOOK | {"answer": 1}], code_run=[])
    for call, said in (
        (lambda: asked(None), "needs the folder with its files: --data FOLDER"),
        (
            lambda: asked(data, "kv_retrieval"),
            "kv_retrieval.jsonl; these are there: --tasks passkey math_find code_run",
        ),
        (lambda: asked(data, "math_find"), "math_find.jsonl: item '\\?' does not say"),
        (lambda: asked(data, "code_run"), "no JSON"),
        (lambda: asked(data, "passkey", positions=6), "6 tokens to generate leave no room"),
    ):
        (data / "code_run.jsonl").write_text("{\n")
        with pytest.raises(ValueError, match=said):
            call()


def test_predictions_of_the_official_scripts_are_scored(tmp_path: Path) -> None:
    """Task in the file's name, also of a part of a file; answers in the rows, or of the folder of the samples."""
    own = tmp_path / "preds"
    own.mkdir()
    for name, rows in (
        ("preds_passkey_0-1.jsonl", [{"id": 0, "prediction": "0", "ground_truth": ["0"]}]),
        ("preds_passkey_1-2.jsonl", [{"id": 1, "prediction": "0", "ground_truth": ["1"]}]),
        ("preds_longbook_qa_eng.jsonl", [{"id": 0, "pred": "a red fox", "label": ["red owl"]}]),
    ):
        (own / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = benchmark_from("infinitebench", {"tasks": ("passkey", "longbook_qa_eng")})
    results = asked.report(checked_predictions(asked, own, None)).results
    assert results["scores"] == {"passkey": 50.0, "longbook_qa_eng": 50.0}
    assert (results["average"], results["samples"]["passkey"]) == (50.0, 2)
    data = data_of(tmp_path / "d", passkey=passkeys(2), longbook_qa_eng=[BOOK | {"answer": ["red fox"]}])
    results = asked.report(checked_predictions(asked, own, data)).results
    assert results["scores"] == {"passkey": 50.0, "longbook_qa_eng": 100.0}
    (data / "passkey.jsonl").write_text((data / "passkey.jsonl").read_text() * 2)
    with pytest.raises(ValueError, match="2 missing ids: passkey 2, passkey 3"):
        checked_predictions(asked, own, data)
    (own / "preds_passkey_1-2.jsonl").rename(own / "preds_other.jsonl")
    with pytest.raises(ValueError, match=r"not called preds_TASK\.jsonl"):
        checked_predictions(asked, own, None)
