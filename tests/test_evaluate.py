"""tools/evaluate.py: predictions files scored or refused, and the demo's checkpoint evaluated by real ranks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_longact.evaluation.arguments import EvaluationConfig, add_evaluation_args, check_asked, config_from_args
from megatron_longact.evaluation.plots import curves_figure
from megatron_longact.evaluation.prediction_log import PredictionLog, open_log
from megatron_longact.evaluation.scoring import checked_predictions, table_text
from megatron_longact.tasks import by_length, longbench_v2, ruler
from megatron_longact.tasks.benchmark import Group
from megatron_longact.tasks.benchmarks import BENCHMARKS, benchmark_from
from megatron_longact.tasks.intervals import percent_interval
from megatron_longact.tasks.ruler.benchmark import CATEGORIES
from tests.launch import ROOT, demo_model_args
from tests.ranks import run_program

START = ROOT / "examples/demo/start_checkpoint"


def _load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _load_tool()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ruler_rows(task: str = "vt", length: int = 4096, count: int = 4) -> list[dict[str, Any]]:
    """Every second one right."""
    return [
        {
            "task": task,
            "max_seq_length": length,
            "index": i,
            "pred": f" A{i}\n" if i % 2 == 0 else "",
            "outputs": [f"a{i}"],
            "others": {"haystack": "essays"},
        }
        for i in range(count)
    ]


def longbench_items(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "_id": f"id{i}",
            "difficulty": ("easy", "hard")[i % 2],
            "length": ("short", "medium", "long")[i % 3],
            "question": "What?",
            **{f"choice_{letter}": letter.lower() for letter in "ABCD"},
            "answer": "A",
            "context": "word " * 400,
        }
        for i in range(count)
    ]


def score(tmp_path: Path, benchmark: str, *flags: str | Path) -> dict[str, Any]:
    """Run the tool; what it wrote."""
    output = tmp_path / "out"
    status = TOOL.main(["--benchmark", benchmark, "--output", str(output), "--overwrite", *map(str, flags)])
    assert status == 0
    assert (output / "scores.png").stat().st_size > 5000
    return json.loads((output / "results.json").read_text())


def test_ruler_predictions_become_a_table_json_and_a_picture(tmp_path, capsys):
    rows = ruler_rows() + ruler_rows(length=8192) + ruler_rows("qa_1", count=2)
    results = score(tmp_path, "ruler", "--predictions", write(tmp_path / "predictions.jsonl", rows))
    assert results["scores"] == {"4096": {"vt": 50.0, "qa_1": 50.0}, "8192": {"vt": 50.0}}
    assert results["averages"] == {"4096": 50.0, "8192": 50.0}
    assert results["nulls"]["4096"] == {"vt": 2, "qa_1": 1}
    assert results["samples"]["8192"] == {"vt": 4}
    assert results["sources"] == {"haystack": ["essays"]}
    shown = capsys.readouterr().out
    assert "4096 tokens" in shown
    assert [line.split() for line in shown.split("\n") if line.startswith("qa_1")] == [["qa_1", "50.00", "(9-91)", "-"]]
    assert "2 to 4 samples each; 5 empty predictions" in shown
    assert results["intervals"]["4096"] == {"vt": [15.0, 85.0], "qa_1": [9.45, 90.55]}
    assert results["average_intervals"]["4096"] == percent_interval(50.0, 4 / (1 / 4 + 1 / 2))


def test_scores_of_a_file_are_those_of_the_functions(tmp_path):
    samples = ruler.generate("niah_multivalue", num_samples=5, max_seq_length=1500, tokenizer=Letters(), seed=1)
    predictions = [" ".join(sample["outputs"][: i + 1]) for i, sample in enumerate(samples)]
    rows = [
        {"index": s["index"], "pred": p, "outputs": s["outputs"], "others": s["others"]}
        for s, p in zip(samples, predictions, strict=True)
    ]
    path = write(tmp_path / "any.jsonl", rows)
    expected = ruler.score("niah_multivalue", predictions, [s["outputs"] for s in samples])
    for more in ((), ("--data", write(tmp_path / "samples/all.jsonl", samples))):
        results = score(tmp_path, "ruler", "--predictions", path, *more)
        assert results["scores"] == {"1500": {"niah_multivalue": expected}}


def test_files_of_the_official_scripts_are_read(tmp_path):
    """Task and length in the path, and niah.py's place of the answer where the index belongs."""
    rows = []
    for i in range(3):
        text = f"{'x' * (i // 2)} The number is 123456{i}. And then"
        rows.append({"input": text, "outputs": [f"123456{i}"], "pred": f"123456{i}", "others": {}, "length": 9})
        rows[i]["index"] = text.find(rows[i]["outputs"][0])
    assert rows[0]["index"] == rows[1]["index"]
    write(tmp_path / "model/8192/pred/niah_single_1.jsonl", rows)
    vt = [{name: row[name] for name in ("index", "pred", "outputs")} for row in ruler_rows()]
    write(tmp_path / "model/16384/pred/vt.jsonl", vt)
    results = score(tmp_path, "ruler", "--predictions", tmp_path / "model")
    assert results["scores"] == {"8192": {"niah_single_1": 100.0}, "16384": {"vt": 50.0}}


def test_a_folder_of_ours_and_hidden_files_in_one_are_read_as_they_are_meant(tmp_path):
    own = tmp_path / "own"
    write(own / "predictions.jsonl", ruler_rows())
    (own / "results.json").write_text('{\n  "scores": {}\n}\n')
    (own / "settings.json").write_text("{\n}\n")
    write(own / "8192/vt.jsonl", ruler_rows(length=8192))
    write(own / "8192/.ipynb_checkpoints/vt-checkpoint.jsonl", ruler_rows(length=8192))
    write(own / ".trash/vt.jsonl", ruler_rows())
    results = score(tmp_path, "ruler", "--predictions", own)
    assert results["samples"] == {"4096": {"vt": 4}, "8192": {"vt": 4}}


def test_results_of_other_predictions_are_not_replaced_unasked(tmp_path, capsys):
    first, second = (write(tmp_path / name, ruler_rows(count=n)) for name, n in (("a.jsonl", 2), ("b.jsonl", 4)))
    score(tmp_path, "ruler", "--predictions", first)
    before = (tmp_path / "out/results.json").read_bytes()
    again = ["--benchmark", "ruler", "--output", str(tmp_path / "out"), "--predictions", str(second)]
    assert TOOL.main(again) == 1
    assert (tmp_path / "out/results.json").read_bytes() == before
    assert "is there already: give another --output, or --overwrite to replace it" in capsys.readouterr().err
    assert score(tmp_path, "ruler", "--predictions", first)["samples"] == {"4096": {"vt": 2}}
    assert score(tmp_path, "ruler", "--predictions", second, "--overwrite")["samples"] == {"4096": {"vt": 4}}


def without(rows: list[dict[str, Any]], *places: int) -> list[dict[str, Any]]:
    return [row for i, row in enumerate(rows) if i not in places]


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (without(ruler_rows(), 1), None, "1 missing id: 4096 vt 1 (of 4 samples)"),
        (without(ruler_rows(), 3), ruler_rows(), "1 missing id: 4096 vt 3 (of 4 samples)"),
        (without(ruler_rows(), 0, 2, 3), ruler_rows(), "3 missing ids: 4096 vt 0, 4096 vt 2, 4096 vt 3"),
        (ruler_rows() + ruler_rows()[:1], None, "1 doubled id: 4096 vt 0"),
        (ruler_rows() + ruler_rows()[:1], ruler_rows(), "1 doubled id: 4096 vt 0"),
        (ruler_rows(count=5), ruler_rows(), "1 unknown id: 4096 vt 4"),
        (ruler_rows(length=8192), ruler_rows(), "4 missing ids"),
        (ruler_rows("cwe"), ruler_rows(), "4 unknown ids: 4096 cwe 0"),
        ([{"task": "vt", "pred": "x"}], None, "has no 'id': task, pred"),
        ([{"task": "vt", "index": 0, "outputs": ["x"]}], None, "has no 'pred' or 'prediction'"),
        ([{"task": "vt", "index": 0, "pred": "x"}], None, "has no 'output'"),
        ([{"index": 0, "pred": "x", "outputs": ["x"]}], None, "neither the file nor its folder is named after one"),
        ([], None, "holds no predictions"),
    ],
)  # fmt: skip
def test_ruler_predictions_that_do_not_match_are_refused(tmp_path, capsys, rows, data, message):
    flags = ["--predictions", str(write(tmp_path / "p.jsonl", rows))]
    flags += [] if data is None else ["--data", str(write(tmp_path / "d.jsonl", data))]
    assert TOOL.main(["--benchmark", "ruler", "--output", str(tmp_path / "out"), *flags]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("outputs", None, "has null as its 'outputs'; it must be a list of right answers"),
        ("outputs", [], "has [] as its 'outputs'"),
        ("outputs", ["a1", None], "has [\"a1\", null] as its 'outputs'"),
        ("outputs", {"a": 1}, "has {\"a\": 1} as its 'outputs'; it must be a text"),
        ("pred", {"text": ["a1"]}, "as its 'pred'; it must be a text"),
        ("pred", ["a1", "a2"], "as its 'pred'; it must be a text"),
        ("pred", True, "has true as its 'pred'"),
        ("index", None, "has null as its 'index'; it must be a whole number or a string"),
        ("index", [1], "has [1] as its 'index'"),
        ("index", 1.5, "has 1.5 as its 'index'"),
        ("max_seq_length", "4k", "has \"4k\" as its 'max_seq_length'; it must be a whole number"),
        ("max_seq_length", [4096], "has [4096] as its 'max_seq_length'"),
        ("max_seq_length", float("inf"), "has Infinity as its 'max_seq_length'"),
    ],
)
def test_ruler_rows_of_another_shape_are_named(tmp_path, capsys, field, value, message):
    rows = ruler_rows()
    rows[1][field] = value
    path = write(tmp_path / "p.jsonl", rows)
    assert TOOL.main(["--benchmark", "ruler", "--predictions", str(path), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("evaluate: row ")
    assert said.count("\n") == 1


def test_ruler_rows_of_another_shape_that_say_the_same_are_read(tmp_path):
    expected = score(tmp_path, "ruler", "--predictions", write(tmp_path / "p.jsonl", ruler_rows(count=6)))
    rows = [
        row | {"index": index, "max_seq_length": length, "outputs": row["outputs"][0], "task": task, "others": others}
        for row, index, length, task, others in zip(
            ruler_rows(count=6),
            ("0", 1.0, " 2 ", 3, "4", 5),
            ("4096", 4096.0, 4096, None, "4096", 4096),
            ("vt", None, "vt", ["vt"], 3, "vt"),
            (
                {"haystack": "essays"},
                {"task": "vt"},
                "odd",
                {"task": "vt", "max_seq_length": 4096},
                {"task": "vt"},
                None,
            ),
            strict=True,
        )
    ]
    del rows[3]["max_seq_length"]
    rows[0]["pred"], rows[1]["pred"], rows[3]["pred"] = [rows[0]["pred"]], None, 3
    got = score(tmp_path, "ruler", "--predictions", write(tmp_path / "q.jsonl", rows))
    assert got["scores"] == expected["scores"]
    assert got["nulls"]["4096"]["vt"] == 2  # 3 is a text, though a wrong one
    numbers = [row | {"pred": 12, "outputs": [12]} for row in ruler_rows(count=2)]
    assert (
        score(tmp_path, "ruler", "--predictions", write(tmp_path / "r.jsonl", numbers))["scores"]["4096"]["vt"] == 100.0
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_predictions_that_json_cannot_read_are_named(tmp_path, capsys, text):
    (tmp_path / "p.jsonl").write_text(text)
    flags = ["--benchmark", "ruler", "--predictions", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out")]
    assert TOOL.main(flags) == 1
    assert "not JSON that can be read" in capsys.readouterr().err


def answers(*letters: str | None) -> list[dict[str, Any]]:
    said = [f"The correct answer is ({letter})" if letter else "I do not know" for letter in letters]
    return [{"_id": f"id{i}", "response": text} for i, text in enumerate(said)]


def test_longbench_predictions(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(longbench_items()))
    path = write(tmp_path / "p.jsonl", answers("A", "A", "B", None, "A", "C"))
    results = score(tmp_path, "longbench-v2", "--predictions", path, "--data", data)
    assert results["scores"] == {
        "overall": 50.0,
        "easy": 66.7,
        "hard": 33.3,
        "short": 50.0,
        "medium": 100.0,
        "long": 0.0,
    }
    assert results["compensated"]["overall"] == 54.2
    assert results["no_answer"] == 1
    assert results["samples"] == {"overall": 6, "easy": 3, "hard": 3, "short": 2, "medium": 2, "long": 2}
    assert ["medium", "100.0", "(34-100)", "100.0", "2"] in [
        line.split() for line in capsys.readouterr().out.split("\n")
    ]


def test_longbench_rows_of_the_official_script_need_no_data(tmp_path):
    rows = [item | {"response": "x", "pred": "A", "judge": True} for item in longbench_items()]
    for row in rows:
        del row["response"]
    path = write(tmp_path / "p.jsonl", rows)
    assert score(tmp_path, "longbench-v2", "--predictions", path)["scores"]["overall"] == 100.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (answers("A", "A", "A", "A", "A"), "1 missing id: id5"),
        (answers(*"AAAAAAA"), "1 unknown id: id6"),
        (answers(*"AAAAAA") + answers("B"), "1 doubled id: id0"),
        ([{"_id": f"id{i}"} for i in range(6)], "has no 'pred'"),
        ([{"_id": ["id0"], "pred": "A"}], "has [\"id0\"] as its '_id'; it must be a string or a whole number"),
        ([{"_id": None, "pred": "A"}], "has null as its '_id'"),
        ([*answers("A"), {"_id": "id1", "response": {"text": "A"}}, *answers(*"AAAAAA")[2:]], "as its 'response'"),
        ([{"_id": f"id{i}", "pred": True} for i in range(6)], "has true as its 'pred'; it must be a text"),
    ],
)
def test_longbench_predictions_that_do_not_match_are_refused(tmp_path, capsys, rows, message):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(longbench_items()))
    flags = ["--predictions", str(write(tmp_path / "p.jsonl", rows)), "--data", str(data)]
    assert TOOL.main(["--benchmark", "longbench-v2", "--output", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_longbench_answers_of_another_shape(tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(longbench_items()))
    right = [item["answer"] for item in longbench_items()]
    preds = [f"({right[0]})", [right[1]], f" {right[2]}.", f"The correct answer is {right[3]}", None, 5]
    rows = [{"_id": f"id{i}", "pred": pred} for i, pred in enumerate(preds)]
    results = score(tmp_path, "longbench-v2", "--predictions", write(tmp_path / "p.jsonl", rows), "--data", data)
    assert (results["scores"]["overall"], results["no_answer"]) == (66.7, 2)
    rows = [{"_id": f"id{i}", "response": [f"The correct answer is ({letter})"]} for i, letter in enumerate(right)]
    rows[0]["response"] = None
    results = score(tmp_path, "longbench-v2", "--predictions", write(tmp_path / "p.jsonl", rows), "--data", data)
    assert (results["scores"]["overall"], results["no_answer"]) == (83.3, 1)
    items = longbench_items()
    items[2]["answer"] = None
    data.write_text(json.dumps(items))
    flags = ["--predictions", str(tmp_path / "p.jsonl"), "--data", str(data), "--output", str(tmp_path / "out")]
    assert TOOL.main(["--benchmark", "longbench-v2", *flags]) == 1
    assert "has null as its 'answer'; it must be A, B, C or D" in capsys.readouterr().err


def test_flags_that_make_no_sense_are_refused(tmp_path, capsys):
    path = str(write(tmp_path / "p.jsonl", ruler_rows()))
    output = ["--output", str(tmp_path / "out")]
    for flags in ([], ["--load", "x", "--predictions", path], ["--predictions", path, "--num-layers", "3"]):
        with pytest.raises(SystemExit) as ended:
            TOOL.main(["--benchmark", "ruler", *output, *flags])
        assert ended.value.code == 2
    assert TOOL.main(["--benchmark", "ruler", *output, "--predictions", path, "--tasks", "niah"]) == 1
    assert "--tasks has 'niah'; RULER's tasks are niah_single_1" in capsys.readouterr().err
    assert TOOL.main(["--benchmark", "ruler", *output, "--predictions", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read" in capsys.readouterr().err


class Letters:
    """Tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def config(*flags: str) -> EvaluationConfig:
    return config_from_args(add_evaluation_args(argparse.ArgumentParser()).parse_args(flags))


def groups_of(config: EvaluationConfig, *, positions: int) -> list[Group]:
    return benchmark_from(config.benchmark, vars(config)).samples(Letters(), positions=positions)


def check_lengths(config: EvaluationConfig) -> None:
    benchmark_from(config.benchmark, vars(config)).check_lengths(Letters())


def test_longbench_prompts_fit_into_the_model(tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(longbench_items(70)))
    template = "<user>{task_template}</user>\\n"
    flags = ["--benchmark", "longbench-v2", "--data", str(data), "--model-template", template]
    groups = groups_of(config(*flags, "--max-length", "300"), positions=500)
    assert [len(group.ids) for group in groups] == [64, 6]
    [*_, sample] = groups[1].make()
    text = bytes(list(sample.tokens)).decode()
    prompt = longbench_v2.build_prompt(longbench_items(70)[-1])
    assert text == f"<user>{prompt[:150]}{prompt[-150:]}</user>\n"
    row = sample.answered(" The correct answer is (A) ")
    assert (row["_id"], row["pred"], row["judge"]) == ("id69", "A", True)
    [*_, sample] = groups_of(config(*flags), positions=500)[0].make()
    assert len(sample.tokens) == 500 - 128
    for more, positions, message in (
        (["--max-length", "360"], 500, "--max-length can be at most 358"),
        (["--style", "cot"], 500, "1024 tokens to generate leave no room"),
        (["--style", "rag"], 500, "has no 'retrieved_context'"),
    ):
        with pytest.raises(ValueError, match=message):
            groups_of(config(*flags, *more), positions=positions)
    with pytest.raises(ValueError, match="needs its file: --data"):
        groups_of(config("--benchmark", "longbench-v2"), positions=500)


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """The least that a benchmark can be asked with."""
    (folder / "data.json").write_text(json.dumps(longbench_items()))
    write(folder / "passkey.jsonl", [{"context": "x", "input": "y", "answer": [str(i)]} for i in range(4)])
    return {
        "ruler": {"tasks": ("vt", "qa_1"), "lengths": (4096,), "num_samples": 2},
        "needle": {"lengths": (800,), "num_samples": 2},
        "longbench-v2": {"data": folder / "data.json"},
        "infinitebench": {"data": folder, "tasks": ("passkey",)},
    }[name]


def right_answer(name: str, row: dict[str, Any]) -> str:
    if name == "infinitebench":
        return f"It is {row['ground_truth'][0]}."
    return f"The correct answer is ({row['answer']})" if name == "longbench-v2" else " ".join(row["outputs"])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_a_benchmark_asks_it_reads_and_scores(name: str, tmp_path: Path) -> None:
    """Samples, their rows as JSON lines, back by id, one right and one wrong in turn, to scores and a table."""
    benchmark = benchmark_from(name, settings_of(name, tmp_path))
    groups = benchmark.samples(Letters(), positions=9000)
    samples = [sample for group in groups for sample in group.make()]
    ids = [each for group in groups for each in group.ids]
    assert [sample.id for sample in samples] == ids
    said = [right_answer(name, sample.answered("")) if i % 2 else "no idea" for i, sample in enumerate(samples)]
    path = write(tmp_path / "p.jsonl", [sample.answered(text) for sample, text in zip(samples, said, strict=True)])
    rows = checked_predictions(benchmark, path, None)
    assert list(rows) == ids
    assert [benchmark.score(row) for row in rows.values()] == [100.0 * (i % 2) for i in range(len(ids))]
    report = benchmark.report(rows)
    assert report.results["benchmark"] == name
    assert "50.0" in table_text(report.table)


def test_ruler_lengths_must_fit_into_the_model():
    flags = ["--benchmark", "ruler", "--tasks", "vt", "--lengths", "4096", "2048", "--num-samples", "2"]
    groups = groups_of(config(*flags), positions=4096)
    assert [group.ids for group in groups] == [((n, "vt", 0), (n, "vt", 1)) for n in (2048, 4096)]
    sample = groups[0].make()[0]
    assert len(sample.tokens) + sample.tokens_to_generate <= 2048
    assert "input" not in sample.answered("x")
    assert groups_of(config(*flags, "--keep-inputs"), positions=4096)[0].make()[0].answered("x")["input"]
    with pytest.raises(ValueError, match="--lengths asks for 4096 tokens, but the model has 4095 positions"):
        groups_of(config(*flags), positions=4095)


def test_tasks_that_do_not_fit_are_named_before_a_model_is_loaded_with_those_that_do() -> None:
    flags = ("--benchmark", "ruler", "--num-samples", "3", "--tokens-to-generate", "4")
    tasks = ("--tasks", "niah_single_1", "vt", "cwe", "niah_multikey_3")
    with pytest.raises(ValueError, match=r"^--lengths 1200: vt \(needs \d+\), cwe ") as refused:
        check_lengths(config(*flags, *tasks, "--lengths", "1200", "9000"))
    least = {task: int(tokens) for task, tokens in re.findall(r"(\w+) \(needs (\d+)\)", str(refused.value))}
    fit = str(refused.value).split("these fit: --tasks ")[1].split()
    assert [task for task in tasks[1:] if task in least or task in fit] == list(tasks[1:])
    for task, length in least.items():  # each number is the truth
        settings = {"num_samples": 3, "tokens_to_generate": 4, "tokenizer": Letters()}
        assert len(ruler.generate(task, max_seq_length=length, **settings)) == 3
        with pytest.raises(ValueError, match="does not fit"):
            ruler.generate(task, max_seq_length=length - 1, **settings)
    with pytest.raises(ValueError, match="give longer --lengths"):
        check_lengths(config(*flags, "--tasks", "vt", "--lengths", "64"))


def test_equal_scores_are_drawn_apart_and_no_tick_is_above_100_percent() -> None:
    scores = {"4096": dict.fromkeys(ruler.TASKS, 100.0)}
    picture = by_length.picture({"scores": scores, "averages": {"4096": 100.0}}, "RULER", CATEGORIES)
    curves = curves_figure(picture).axes[0]
    places = [tuple(line.get_xdata()) for line in curves.lines]
    assert len(set(places)) == len(places) == 5
    assert max(curves.get_yticks()) == 100


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--benchmark", "ruler", "--style", "cot"), "--style goes with LongBench v2, not with --benchmark ruler"),
        (("--benchmark", "ruler", "--data", "x"), "--data goes with LongBench v2, InfiniteBench, not with"),
        (("--benchmark", "needle", "--essays", "x"), "--essays goes with RULER, not with --benchmark needle"),
        (("--benchmark", "longbench-v2", "--tokens-to-generate", "8"), "--tokens-to-generate goes with"),
    ],
)
def test_flags_of_other_benchmarks_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        check_asked(config(*flags))
    check_asked(config("--benchmark", "ruler", "--tasks", "vt", "--essays", "x", "--keep-inputs"))
    check_asked(config("--benchmark", "longbench-v2", "--data", "x", "--sample-seed", "7"))  # it samples


def test_a_log_goes_on_only_with_the_same_settings(tmp_path):
    assert open_log(tmp_path, {"seed": 1, "tasks": ("vt",)}) == []
    log = PredictionLog(tmp_path)
    log.append([{"index": 0}, {"index": 1}])
    log.close()
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"index": 2, "pred": "half a li')
    rows = open_log(tmp_path, {"seed": 1, "tasks": ("vt",)})
    assert [row["index"] for row in rows] == [0, 1]
    assert (tmp_path / "predictions.jsonl").read_text() == '{"index": 0}\n{"index": 1}\n'
    with pytest.raises(ValueError, match=r"another seed \(1, not 2\)"):
        open_log(tmp_path, {"seed": 2, "tasks": ("vt",)})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"predictions without settings\.json"):
        open_log(tmp_path, {"seed": 1})


def test_settings_without_a_prediction_hold_nobody(tmp_path):
    """They are what an evaluation left that failed before its first answer."""
    open_log(tmp_path, {"lengths": [64]})
    assert open_log(tmp_path, {"lengths": [1024]}) == []
    (tmp_path / "predictions.jsonl").touch()
    assert open_log(tmp_path, {"lengths": [2048]}) == []
    assert json.loads((tmp_path / "settings.json").read_text()) == {"lengths": [2048]}


def evaluate(output: Path, *flags: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the tool on the demo's checkpoint."""
    program = [str(ROOT / "tools/evaluate.py"), "--output", str(output), "--load", str(START)]
    return run_program(*program, *demo_model_args(), *flags, world_size=ranks, launcher=False)


RULER_FLAGS = [
    *("--benchmark", "ruler"),
    *("--tasks", "niah_single_1", "fwe"),
    *("--lengths", "288", "384"),
    *("--num-samples", "3"),
    *("--tokens-to-generate", "12"),
    *("--chat-template", "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"),
    "--keep-inputs",
]


def rows_of(output: Path) -> dict[tuple[Any, ...], str]:
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len({json.dumps(row) for row in rows}) == len(rows)
    return {(row["max_seq_length"], row["task"], row["index"]): row["pred"] for row in rows}


@pytest.mark.timeout(300)
def test_a_checkpoint_is_evaluated_and_a_killed_evaluation_goes_on(tmp_path):
    """On two ranks, sequence parallel; then on one, from what a kill would have left, with the same responses."""
    done = evaluate(tmp_path, *RULER_FLAGS, "--tensor-model-parallel-size", "2", "--sequence-parallel", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "12/12" in done.stdout
    assert "288 tokens" in done.stdout
    rows, results = rows_of(tmp_path), json.loads((tmp_path / "results.json").read_text())
    assert set(rows) == {(n, t, i) for n in (288, 384) for t in ("niah_single_1", "fwe") for i in range(3)}
    assert any(rows.values())
    assert "each prompt is a user's turn of the chat template (--no-apply-chat-template: alone)" in done.stdout
    assert results["settings"]["model_template"] == "[user] {task_template} [assistant]"
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        assert json.loads(line)["input"].startswith("[user] ")
    assert "CHANGED: answers have at most 12 tokens, officially niah_single_1 128, fwe 50: figures" in done.stdout
    assert results["intervals"]["288"]["fwe"] == percent_interval(results["scores"]["288"]["fwe"], 3)
    assert "(low-high): 95 % Wilson score interval" in done.stdout
    assert results["settings"]["iteration"] == "800"
    assert results["sources"]["words"] == [f"words of wonderwords {version('wonderwords')}"]
    assert (tmp_path / "scores.png").stat().st_size > 5000

    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    again = evaluate(tmp_path, *RULER_FLAGS)
    assert again.returncode == 0, again.stderr
    assert "5 of 12 predictions are there already" in again.stdout
    assert rows_of(tmp_path) == rows
    assert json.loads((tmp_path / "results.json").read_text()) == results

    other = evaluate(tmp_path, *RULER_FLAGS, "--sample-seed", "8")
    assert other.returncode == 1
    assert other.stderr.strip().split("\n")[-1].startswith("evaluate: ")
    assert "holds an evaluation with another sample_seed (42, not 8)" in other.stderr


@pytest.mark.timeout(200)
def test_longbench_with_chain_of_thought_on_two_replicas(tmp_path):
    """1024 tokens of reasoning, then the answer; with RoPE the demo's model may be told of more positions.

    The replicas are ranks that would share rows in training.
    """
    data = tmp_path / "data.json"
    data.write_text(json.dumps(longbench_items(3)))
    flags = ["--benchmark", "longbench-v2", "--style", "cot", "--data", str(data), "--num-samples", "2"]
    flags += ["--max-position-embeddings", "2048", "--max-length", "65", "--inference-max-requests", "1"]
    flags += ["--context-parallel-size", "2"]
    done = evaluate(tmp_path / "out", *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert {row["_id"] for row in rows} == {"id0", "id1"}
    for row in rows:
        assert row["response_cot"]
        assert row["pred"] == longbench_v2.extract_answer(row["response"])
        assert row["judge"] == (row["pred"] == "A")
        assert len(row["context"]) == 1000
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["scores"] == longbench_v2.aggregate(rows)
