"""The RL program as a user starts it: real ranks, the shipped start checkpoint, everything it leaves behind."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.commands.train import launched
from tests import ranks
from tests.launch import ROOT, demo_model_args
from tests.ranks import run_program

pytestmark = pytest.mark.timeout(300)

START = ROOT / "examples/demo/start_checkpoint"
LAST = 4
STOP = 3  # in the middle of a rollout batch: two optimizer steps each

KEYS = {
    "iteration",
    "reward_mean",
    "accuracy",
    "loss",
    "grad_norm",
    "kl",
    "clip_fraction",
    "selected_fraction",
    "importance_weight_mean",
    "groups_thrown_out",
    "padding_share",
    "rollout_tokens_per_s",
    "rollout_train_logprob_abs_diff",
    "longact/active_fraction_q",
    "longact/active_fraction_k",
    "longact/mask_jaccard",
    "longact/mask_jaccard_first",
    "longact/ever_active_fraction",
    "longact/masked_grad_norm_share",
    "longact/time_share",
    "step_time_s",
}
"""What metrics.jsonl and TensorBoard promise."""

OF_THE_STEP = ("reward_mean", "loss", "grad_norm", "kl", "kl_old", "entropy", "selected_fraction", "clip_fraction")
"""What no layout changes beyond rounding."""

FLAGS = [
    *("--context-lengths", "80", "128"),
    *("--seq-length", "144"),
    *("--rl-prompts-per-eval", "4"),
    *("--inference-max-requests", "16"),
    *("--grpo-prompts-per-step", "4"),
    *("--grpo-group-size", "4"),
    *("--grpo-iterations", "1"),
    *("--global-batch-size", "8"),
    *("--micro-batch-size", "4"),
    *("--grpo-clamp-eps-lower", "0.2"),
    *("--grpo-clamp-eps-upper", "0.28"),
    *("--train-iters", str(LAST)),
    *("--lr", "1e-4"),
    *("--lr-decay-style", "constant"),
    *("--lr-warmup-iters", str(LAST), "--lr-decay-iters", "100"),
    *("--weight-decay", "0.1"),
    *("--log-interval", "1"),
    *("--save-interval", "1000"),
    *("--pretrained-checkpoint", str(START)),
]

EVERYTHING = [
    "--longact",
    *("--grpo-kl-beta", "0.01"),
    *("--policy-loss", "kl-cov", "--kl-cov-ratio", "0.1"),
    *("--grpo-filter-groups-with-same-reward", "--overlong-buffer-length", "8"),
    "--rl-inference-logprobs-is-correction",
    "--rl-use-sequence-packing",
    "--sequence-parallel",
    *("--eval-samples", "2"),
]
"""Of a run that uses what there is."""


EXAMPLE = (str(ROOT / "examples/train_grpo.py"),)


def train(
    run_dir: Path, *flags: str, tp: int = 1, pp: int = 1, cp: int = 1, program: Sequence[str] = EXAMPLE
) -> subprocess.CompletedProcess[str]:
    """Run the program on `tp` x `pp` x `cp` ranks."""
    command = [*program, *demo_model_args(), *FLAGS]
    command += ["--run-dir", str(run_dir), "--tensorboard-dir", str(run_dir / "tensorboard")]
    command += ["--load", str(run_dir / "checkpoints"), "--save", str(run_dir / "checkpoints")]
    command += ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    command += ["--context-parallel-size", str(cp), *flags]
    return run_program(*command, world_size=tp * pp * cp)


def rows_of(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run without a break at TP=2, sequence parallel, with everything; its folder and what the terminal showed."""
    run_dir = tmp_path_factory.mktemp("straight")
    done = train(run_dir, *EVERYTHING, "--save-first-iteration", tp=2)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def test_metrics_are_complete(straight: tuple[Path, str]) -> None:
    rows = rows_of(straight[0])
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() >= KEYS
        missing = {name for name in KEYS if row[name] is None}
        assert missing == ({"longact/mask_jaccard"} if row["iteration"] == 1 else set())
        assert row["longact/active_fraction_q"] == pytest.approx(0.3, abs=0.01)
        assert row["rollout_train_logprob_abs_diff"] < 1e-4
        assert row["grad_norm"] > 0
    assert rows[0]["kl"] == 0  # the policy is still the reference
    assert rows[-1]["kl"] > 0
    assert rows[0]["reward_mean"] == rows[1]["reward_mean"]  # one rollout batch
    assert rows[0]["kl_old"] == 0
    assert any(row["reward_mean"] > 0 for row in rows)


def test_tensorboard_has_the_same_names(straight: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    rows = rows_of(straight[0])
    for name in KEYS - {"iteration"}:
        logged = {event.step: event.value for event in events.Scalars(name)}
        expected = {row["iteration"]: row[name] for row in rows if row[name] is not None}
        assert logged == pytest.approx(expected, rel=1e-6), name
    assert {event.step for event in events.Scalars("heldout/accuracy")} == {0, LAST}
    texts = {event.step: str(event.tensor_proto) for event in events.Tensors("answers/rollouts/text_summary")}
    answers = rows_of(straight[0], "rollouts.jsonl")
    assert texts.keys() == {row["iteration"] for row in answers} == {1, 3}  # two optimizer steps a rollout batch
    assert any(f"answer:\\n\\n    {row['response']}" in texts[1] for row in answers)
    assert {event.step for event in events.Tensors("answers/heldout/text_summary")} == {0, LAST}


def test_learning_rate_goes_by_responses_and_not_by_rows(straight: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    rates = {event.step: event.value for event in events.Scalars("learning-rate")}
    assert rates == pytest.approx({i: 1e-4 * i / LAST for i in range(1, LAST + 1)})


def test_it_says_what_came_out(straight: tuple[Path, str]) -> None:
    run_dir, shown = straight
    assert "4/4  reward" in shown
    assert "responses end at </s> (2, of the tokenizer)" in shown
    assert "all 8 tasks" in shown
    assert "frozen rows changed           0 of " in shown
    assert "frozen rows changed           0 of 0" not in shown
    assert "megatron" not in shown.replace(str(run_dir), "")  # its own output is in the log
    assert "iteration        4/       4" in (run_dir / "megatron.log").read_text()
    evaluations = rows_of(run_dir, "evaluations.jsonl")
    assert [row["iteration"] for row in evaluations] == [0, LAST]
    answers = rows_of(run_dir, "heldout.jsonl")
    assert [(row["iteration"], row["prompt"]) for row in answers] == [(i, n) for i in (0, LAST) for n in range(8)]
    for evaluation in evaluations:
        own = [row for row in answers if row["iteration"] == evaluation["iteration"]]
        assert [row["reward"] for row in own] == evaluation["rewards"]
        assert [row["correct"] for row in own].count(True) == 8 * evaluation["accuracy"]
        assert [row["ended"] for row in own].count("length") == 8 * evaluation["truncated_fraction"]
    assert evaluations[0]["accuracy_by_length"].keys() == {"80", "128"}
    for name in ("report.md", "saliency.png", "reward.png"):
        assert (run_dir / name).stat().st_size > 500
    for iteration in (1, LAST):
        assert (run_dir / f"checkpoints/iter_{iteration:07d}/.metadata").is_file()


def test_a_second_command_loses_nothing(straight: tuple[Path, str]) -> None:
    run_dir, _ = straight
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "megatron.log"}
    for flags in (["--train-iters", "1"], ["--train-iters", "1", "--load", str(START)], ["--finetune"]):
        done = train(run_dir, *EVERYTHING, *flags)
        assert done.returncode == 1
        [line] = done.stderr.strip().splitlines()
        assert line.startswith("megatron_longact: ")
        assert f"holds a run at iteration {LAST}" in line
        assert "another --run-dir and --save, or --overwrite, start anew" in line
    assert {path: path.read_bytes() for path in before} == before


def test_help_is_readable_and_begins_with_ours() -> None:
    done = run_program(str(ROOT / "examples/train_grpo.py"), "--help", world_size=1)
    assert done.returncode == 0, done.stderr
    flags = ("--longact ", "--run-dir ", "--num-layers ")
    places = [done.stdout.index(flag) for flag in flags]
    assert places == sorted(places)
    assert places[0] < 4000


def test_gradients_that_are_nan_end_a_run_in_one_line(tmp_path: Path) -> None:
    """Another start is asked for once; on the same machine again the run stays down."""
    flags = (
        "--longact",
        "--train-iters",
        "6",
        "--lr",
        "1e30",
        "--lr-warmup-iters",
        "0",
        "--grpo-kl-beta",
        "0",
        "--eval-interval",
        "1000",
    )
    for code, said in ((16, "saved; started on another GPU"), (17, "it stays down")):
        done = train(tmp_path, *flags)
        assert done.returncode == code, done.stderr
        [line] = [line for line in done.stdout.splitlines() if " are NaN" in line]
        assert line.startswith("gradients are NaN at iteration 2, ")
        assert said in line
        assert line.endswith(f"see {tmp_path}/megatron.log")


def tensors_in(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: tensor for part, value in parts for key, tensor in tensors_in(value, f"{name}/{part}").items()}


def compare_checkpoints(first: str, second: str) -> list[str]:
    """Assert that all tensors of two checkpoints are bit-equal; their names."""
    from megatron.core import dist_checkpointing

    a, b = (tensors_in(dist_checkpointing.load_plain_tensors(directory)) for directory in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    return list(a)


def test_a_stopped_run_goes_on_as_if_it_had_not(straight: tuple[Path, str], tmp_path: Path) -> None:
    """Bit for bit, from the middle of a rollout batch: same rollouts, metrics, weights and optimizer."""
    stopped = train(tmp_path, *EVERYTHING, "--exit-interval", str(STOP), tp=2)
    assert stopped.returncode == 0, stopped.stderr
    assert [row["iteration"] for row in rows_of(tmp_path)] == [1, 2, 3]
    resumed = train(tmp_path, *EVERYTHING, tp=2)
    assert resumed.returncode == 0, resumed.stderr

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if "time" not in k and "per_s" not in k} for row in rows]

    assert timeless(rows_of(tmp_path)) == timeless(rows_of(straight[0]))
    for name in ("evaluations.jsonl", "heldout.jsonl", "rollouts.jsonl"):
        assert rows_of(tmp_path, name) == rows_of(straight[0], name), name
    moved = [
        line
        for run in (tmp_path, straight[0])
        for line in (run / "report.md").read_text().splitlines()
        if line.startswith("| Q/K rows that moved")
    ]
    assert moved[0] == moved[1]
    assert "goes on from iteration 3 of" in resumed.stdout
    last = [str(run / f"checkpoints/iter_{LAST:07d}") for run in (tmp_path, straight[0])]
    [names] = ranks.run(compare_checkpoints, first=last[0], second=last[1])
    for part in ("linear_qkv.weight", "exp_avg_sq", "saliency"):
        assert any(part in name for name in names), part


def test_ranks_that_share_rows_make_the_same_run_and_resume_it_bitwise(
    straight: tuple[Path, str], tmp_path: Path
) -> None:
    """Context parallel, with everything: the metrics of the tensor-parallel run, and the bits of a run that stopped."""
    flags = [*EVERYTHING, "--train-iters", "2", "--save-first-iteration"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = train(whole, *flags, cp=2)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(rows_of(whole), rows_of(straight[0]), strict=False):
        for name in OF_THE_STEP:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), (mine["iteration"], name)
    shutil.copytree(whole / "checkpoints/iter_0000001", stopped / "checkpoints/iter_0000001")
    (stopped / "checkpoints/latest_checkpointed_iteration.txt").write_text("1")
    resumed = train(stopped, *flags, cp=2)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["iteration"] for row in rows_of(stopped)] == [2]
    last = [str(run / "checkpoints/iter_0000002") for run in (whole, stopped)]
    ranks.run(compare_checkpoints, first=last[0], second=last[1])


def test_a_dense_run_through_a_virtual_pipeline(tmp_path: Path) -> None:
    """Two stages of two chunks each; the last one has no layer. Started as `longact train` starts it."""
    virtual = ("--pipeline-model-parallel-layout", "Et|t|t|L", "--micro-batch-size", "2")
    done = train(tmp_path, "--train-iters", "1", "--grpo-kl-beta", "0", *virtual, pp=2, program=launched([]))
    assert done.returncode == 0, done.stderr
    [row] = rows_of(tmp_path)
    assert (row["longact/active_fraction_q"], row["longact/active_fraction_k"]) == (1.0, 1.0)
    nothing = {name for name in KEYS if name.startswith("longact/")} - {
        "longact/active_fraction_q",
        "longact/active_fraction_k",
    }
    assert all(row[name] is None for name in nothing | {"kl"})
    assert "every Q/K row trains" in done.stdout
    assert "not given, so as this program has it: --max-response-length 16" in done.stdout
    assert "defaults of this program" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "saliency.png").exists()


def test_a_context_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path, "--context-lengths", "2000")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("megatron_longact: a context of 2000 tokens")
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "metrics.jsonl").exists()
