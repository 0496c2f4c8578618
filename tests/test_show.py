"""`longact show`: what a run's model said, and why it was wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.commands.report import main as report
from megatron_longact.commands.show import main
from megatron_longact.rl.answers import as_markdown, spread_out

ANSWERS = (
    {"response": "The answer is 47.", "correct": False},  # wrong in its form only
    {"response": "", "correct": False, "response_tokens": 1},
    {"response": "12 and then\x1b[31m " + "on and on " * 400, "correct": False, "ended": "length"},
    {"response": "48", "correct": False, "reward": 0.25},
)


def answer(**known: Any) -> dict[str, Any]:
    row = {"task": "single", "source": "", "prompt_tokens": 900, "prompt_end": "What is\nit?", "response_tokens": 3}
    return row | {"ended": "eod", "reference": ["47"], "reward": 0.0, "correct": False} | known


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is going: its last lines are not written to their end."""
    steps = [
        answer(iteration=step + 1, step=step, prompt=i // 2, sample=i % 2, **each)
        for step in (0, 1, 2)
        for i, each in enumerate(ANSWERS)
    ]
    write(tmp_path / "rollouts.jsonl", steps)
    right = answer(iteration=0, prompt=5, length=1024, response="47", correct=True, reward=1.0)
    write(tmp_path / "heldout.jsonl", [right])
    figures = {"reward_mean": 0.125, "accuracy": 0.25, "truncated_fraction": 0.5, "empty_fraction": 0.0, "responses": 8}
    write(tmp_path / "metrics.jsonl", [{"iteration": 2, "rollout_step": 1, **figures}])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"iteration": 4, "st')
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_last_step_is_shown_and_why_its_answers_are_wrong(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(run))
    assert out.startswith(
        "rollout step 2: of 4 answers written 0 right (0.0%; 95 %: 0-49), 1 ended by length, 1 empty; "
        "mean reward 0.0625\n"
    )
    assert out.count("\n== single, prompt ") == 4
    assert "== single, prompt 1, answer 1: WRONG, reward 0.25; 3 tokens, ended by itself\n" in out
    assert '-- the end of its 900 tokens\nWhat is\nit?\n-- answer\n48\n-- wanted\n["47"]\n' in out
    assert "then\\x1b[31m on" in out  # letter by letter, and nothing that colours the terminal
    assert "characters; --full shows them" in out
    for line in (
        "Why wrong? Of 4 wrong answers among the 4 written:",
        "  1 hold what was wanted all the same: the reward does not read",
        "  1 are empty: ",
        "  1 ended by length: --max-response-length is too short",
        "  1 ended by themselves and say something else",
    ):
        assert line in out


def test_steps_prompts_and_rewards_are_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(run), "--step", "1", "--prompt", "1", "--reward-below", "0.1", "--full")
    assert out.startswith("rollout step 1: of 8 answers (4 written) 2 right (25.0%; 95 %: 7-59), 4 ended by length, ")
    assert out.count("\n== ") == 1
    assert "on and on " * 400 in out
    assert shown(capsys, str(run), "--step", "all").count("\nrollout step") == 2
    heldout = shown(capsys, str(run), "--heldout")
    assert "== single, prompt 5 (1024 tokens): right, reward 1;" in heldout
    assert heldout.endswith("All answers written are right.\n")
    assert "\n== " not in shown(capsys, str(run), "--heldout", "--wrong")


@pytest.mark.parametrize(
    ("remove", "flags", "said"),
    [
        ("rollouts.jsonl", [], "rollouts.jsonl is not there: give the --run-dir of an RL run"),
        ("rollouts.jsonl", [], "heldout.jsonl is there: with --heldout"),
        ("", ["--step", "9"], "has no answers of rollout step 9; it has those of 0-2"),
        ("", ["--step", "last"], "--step is last; give numbers, or all"),
        ("", ["--prompt", "99"], "has no answers to prompt 99 of rollout step 2; it has those to 0-1"),
        (
            "",
            ["--step", "all", "--prompt", "7", "8"],
            "has no answers to prompt 7-8 of these steps; it has those to 0-1",
        ),
    ],
)
def test_what_is_not_there_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], remove: str, flags: list[str], said: str
) -> None:
    if remove:
        (run / remove).unlink()
    assert main([str(run), *flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_reward_that_is_no_number_is_called_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = answer(iteration=9, step=9, prompt=0, response="?")
    rows = [known | {"sample": i, "reward": reward} for i, reward in enumerate((None, 0.5))]
    write(run / "rollouts.jsonl", rows)
    write(run / "metrics.jsonl", [json.loads((run / "metrics.jsonl").read_text()) | {"reward_mean": None}])
    out = shown(capsys, str(run))
    assert "mean reward 0.5\n" in out
    assert "answer 0: WRONG, reward NaN;" in out
    assert shown(capsys, str(run), "--reward-below", "0.6").count("\n== ") == 1
    write(run / "rollouts.jsonl", [row | {"step": 1} for row in rows])
    assert "mean reward NaN\n" in shown(capsys, str(run))


@pytest.mark.parametrize("line", [b'{"iteration": 1, "st\n', b'{"response": "\xff"}\n', b"3\n", b'{"step": 1}\n'])
def test_a_line_that_is_no_row_is_named(run: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run / "rollouts.jsonl"
    rows.write_bytes(line + rows.read_bytes())
    for command in (main, report):
        assert command([str(run)]) == 1
        assert f"{rows}, line 1: no row of a run" in capsys.readouterr().err


def test_no_name_of_a_task_reaches_a_terminal_or_a_page_raw(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(iteration=9, step=9, prompt=0, sample=0, task="t\x1b[2J", source="s\x07", response="\ud800\x1b")
    write(run / "rollouts.jsonl", [said])
    out = shown(capsys, str(run))
    assert "== t\\x1b[2J" in out
    assert "s\\x07" in out
    assert "\x1b" not in out
    assert report([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "\\xd800\\x1b" in page
    assert "\x1b" not in page


def test_answers_are_taken_from_all_over() -> None:
    assert spread_out(5, 9, seed=0) == [0, 1, 2, 3, 4]
    assert spread_out(5, 0, seed=0) == spread_out(0, 5, seed=0) == []
    chosen = spread_out(384, 16, seed=0)
    assert [index // 24 for index in chosen] == list(range(16))
    assert chosen == spread_out(384, 16, seed=0) != spread_out(384, 16, seed=1)
    assert len({index % 4 for index in chosen}) == 4  # tasks take turns: all of them are seen


def test_tensorboard_shows_answers_letter_by_letter() -> None:
    [row] = [answer(prompt=3, response="# no heading\n<b>47</b>")]
    assert "\n\nanswer:\n\n    # no heading\n    <b>47</b>" in as_markdown([row])
