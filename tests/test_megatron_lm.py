"""NVIDIA's own RL loop, `train_rl.py` of Megatron-LM, unedited: its data preparation, log-probs and training step.

    MEGATRON_LM=path/to/Megatron-LM python -m pytest tests/test_megatron_lm.py

Rollouts are ready made (`tests/programs/ready_made_rollouts.py`); all else is its own. docs/megatron_rl.md says which
Python packages it needs.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.qkv_layout import QKVLayout
from tests.launch import QUIET, ROOT, demo_model_args, on_ranks
from tests.launch import run as run_command
from tests.programs.ready_made_rollouts import sample
from tests.programs.train_rl_ready_made import AGENT
from tests.test_checkpoints import assert_bitwise, read, weights_and_moments
from tests.tokenizers import save_hugging_face_tokenizer

MEGATRON_LM = os.environ.get("MEGATRON_LM", "")
SKIPPED = "NVIDIA's RL loop is not tested: MEGATRON_LM does not name a checkout of NVIDIA/Megatron-LM with train_rl.py"
THERE = Path(MEGATRON_LM, "train_rl.py").is_file() if MEGATRON_LM else False
if not THERE:
    warnings.warn(SKIPPED, stacklevel=1)

needs_megatron_lm = pytest.mark.skipif(not THERE, reason=SKIPPED)
pytestmark = pytest.mark.timeout(400)

START = ROOT / "examples/demo/start_checkpoint"
LAYERS, LAYOUT = 3, QKVLayout(num_attention_heads=4, num_query_groups=2, kv_channels=32)
PROMPTS, GROUP, BATCH, STEPS = 4, 2, 4, 2
"""Prompts of a rollout batch, rollouts of a prompt, rollouts of an optimizer step, steps of a rollout batch."""

FLAGS = [
    "--perform-rl-step",
    *("--grpo-prompts-per-step", str(PROMPTS)),
    *("--grpo-group-size", str(GROUP)),
    *("--grpo-iterations", "1"),
    *("--grpo-kl-beta", "0.01"),
    *("--global-batch-size", str(BATCH)),
    *("--micro-batch-size", "1"),
    *("--seq-length", "32"),
    *("--inference-max-seq-length", "32"),
    *("--train-iters", "100"),
    *("--lr", "1e-3"),
    *("--lr-decay-style", "constant"),
    *("--weight-decay", "0.1"),
    *("--log-interval", "1"),
    *("--eval-interval", "1000"),
    *("--eval-iters", "0"),
    *("--save-interval", str(STEPS)),
    *("--ckpt-format", "torch_dist"),
    *("--pretrained-checkpoint", str(START)),
    "--dist-ckpt-optim-fully-reshardable",
    "--use-distributed-optimizer",
    "--bf16",
]
LONGACT = ["--longact", "--longact-refresh-interval", str(STEPS), "--longact-ema", "0.5"]


def python_path(megatron_lm: str) -> str:
    """PYTHONPATH of a program of ours on a checkout of Megatron-LM: behind our folder, for it has a package `tests`."""
    return ":".join([str(ROOT), megatron_lm, *filter(None, [os.environ.get("PYTHONPATH")])])


def train(folder: Path, iterations: int, *flags: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run train_rl.py until an iteration; it saves into the folder, and goes on from what lies there."""
    folder.mkdir(exist_ok=True)
    environment = folder / "environment.yaml"
    environment.write_text(f"- {{agent_type: {AGENT}, agent_args: {{}}, weight: 1.0}}\n")
    program = ["-m", "megatron_longact.run", "--cpu", str(ROOT / "tests/programs/train_rl_ready_made.py")]
    given = ["--langrl-env-config", str(environment), "--tensorboard-dir", str(folder / "tensorboard")]
    given += ["--save", str(folder), "--load", str(folder), "--exit-interval", str(iterations)]
    done = run_command(
        on_ranks(ranks, *program, *demo_model_args(), *FLAGS, *LONGACT, *given, *flags),
        timeout=300,
        environment={**QUIET, "PYTHONPATH": python_path(MEGATRON_LM), "FORWARDS": str(folder / "forwards")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def forwards(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank saw, a row an optimizer step."""
    return [json.loads(line) for line in (folder / f"forwards-{rank}.jsonl").read_text().splitlines()]


def tokens_of(iteration: int) -> list[int]:
    """Tokens of each rollout of the batch that is collected at an iteration, in its order."""
    return [len(sample(iteration, group, member).tokens) for group in range(PROMPTS) for member in range(GROUP)]


def qkv_rows(folder: Path, iteration: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """linear_qkv's weight [layers, rows, h] as the model has it, and its fp32 masters; None: as they began."""
    name = "decoder.layers.self_attention.linear_qkv.weight"
    if iteration is None:
        begun = read(START, 800)[1][name].bfloat16()
        return begun, begun.float()
    tensors = read(folder, iteration)[1]
    return tensors[name], tensors[f"optimizer.state.param.{name}"]


def assert_frozen(folder: Path, *, before: int | None, after: int) -> None:
    """Rows that the mask of `after` freezes have kept their bits since `before`, in both; all others changed."""
    state = read(folder, after)[0]["opt_param_scheduler"]["longact"]
    for old, new in zip(qkv_rows(folder, before), qkv_rows(folder, after), strict=True):
        for layer in range(LAYERS):
            trained = LAYOUT.fused(state["masks"]["q"][layer], state["masks"]["k"][layer], fill=True)
            assert 0.4 < trained.float().mean() < 0.5  # 30 % of Q and K, all of V
            changed = (old[layer] != new[layer]).any(1)
            assert torch.equal(changed, trained)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two rollout batches, four optimizer steps, TP 2; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder, 4, "--tensor-model-parallel-size", "2").stdout


def test_tests_of_a_checkout_do_not_hide_ours(tmp_path: Path) -> None:
    """A whole clone has packages `tests` and `megatron`: of these the first is ours, the second its own."""
    for package in ("tests", "megatron", "megatron/rl"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    shown = "import importlib.util as u; print(*(u.find_spec(m).origin for m in "
    shown += "('tests.programs.ready_made_agent', 'megatron.rl')), sep='\\n')"
    done = run_command(
        [sys.executable, "-P", "-c", shown], timeout=60, environment={"PYTHONPATH": python_path(str(tmp_path))}
    )
    assert done.stdout.split("\n")[:2] == [
        str(ROOT / "tests/programs/ready_made_agent.py"),
        str(tmp_path / "megatron/rl/__init__.py"),
    ], done.stderr


def test_megatron_lies_beside_the_script(tmp_path: Path) -> None:
    """`megatron.training` looks for `megatron.rl` once, when it is imported: it must find the script's own."""
    package = tmp_path / "megatron" / "rl"
    package.mkdir(parents=True)
    (package / "rl_utils.py").touch()
    names = ("RL_LOGGABLE_TIMER_NAMES", "initialize_rl_profiler", "log_iteration_profile", "shutdown_rl_profiler")
    (package / "rl_profiling.py").write_text(f"{' = '.join(names)} = None\n")
    script = tmp_path / "script.py"
    script.write_text("from megatron.training import training\nprint('found:', training.has_rl_utils)\n")
    done = run_command([sys.executable, "-m", "megatron_longact.run", "--cpu", str(script)], timeout=100)
    assert "found: True" in done.stdout, done.stderr


def test_an_old_megatron_is_refused(tmp_path: Path) -> None:
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    (tmp_path / "script.py").touch()
    done = run_command([sys.executable, "-m", "megatron_longact.run", str(tmp_path / "script.py")], timeout=100)
    assert done.returncode == 2
    assert f"megatron_longact: {core} is Megatron 0.16; LongAct's launcher needs 0.17 or newer" in done.stderr
    assert "Traceback" not in done.stderr


@needs_megatron_lm
def test_flags_are_refused_before_anything_starts() -> None:
    """Without PYTHONPATH: the launcher puts the folder of train_rl.py on the path."""
    program = ["-m", "megatron_longact.run", "--cpu", str(Path(MEGATRON_LM, "train_rl.py"))]
    done = run_command([sys.executable, *program, *demo_model_args(), *FLAGS, "--longact-ratio", "7"], timeout=100)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("megatron_longact:")]
    assert len(said) == 1
    assert "--longact-ratio" in said[0]


@needs_megatron_lm
def test_frozen_rows_keep_their_bits(straight: tuple[Path, str]) -> None:
    folder, _ = straight
    assert_frozen(folder, before=None, after=2)
    assert_frozen(folder, before=2, after=4)


@needs_megatron_lm
def test_only_training_forwards_count_and_no_padding(straight: tuple[Path, str]) -> None:
    folder, _ = straight
    for rank in range(2):
        rows = forwards(folder, rank)
        assert [row["training"] for row in rows] == [LAYERS * BATCH] * 4
        assert [row["other"] for row in rows] == [2 * LAYERS * PROMPTS * GROUP, 0] * 2  # old and reference log-probs
        counted = [sum(tokens_of(iteration)[:BATCH]) for iteration in (0, 2)]
        # a selection every second step, and nothing is read in between
        assert [row["tokens"] for row in rows] == [[count] * LAYERS for n in counted for count in (n, 0)]


@needs_megatron_lm
def test_flags_pass_through(straight: tuple[Path, str]) -> None:
    folder, shown = straight
    args = read(folder, 2)[0]["args"]
    assert (args.longact, args.longact_ratio, args.longact_ema) == (True, 0.3, 0.5)
    assert (args.perform_rl_step, args.grpo_kl_beta, args.grpo_group_size) == (True, 0.01, GROUP)
    assert "LongAct starts fresh" in shown


@needs_megatron_lm
def test_scalars_stand_beside_its_own(straight: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight[0] / "tensorboard"))
    events.Reload()
    names = ("rl/kl_term", "rl/pi_over_pi_old", "longact/active_fraction_q", "longact/active_fraction_k")
    logged = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    assert all([step for step, _ in rows] == [1, 2, 3, 4] for rows in logged.values())
    assert [value for _, value in logged["longact/active_fraction_q"]] == pytest.approx([0.3] * 4, abs=0.01)
    assert logged["rl/kl_term"][0][1] == 0
    assert logged["rl/kl_term"][3][1] > 0


@needs_megatron_lm
def test_resume_is_bitwise(straight: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = straight
    (tmp_path / "iter_0000002").symlink_to(folder / "iter_0000002")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    shown = train(tmp_path, 4, "--tensor-model-parallel-size", "2").stdout
    assert "LongAct goes on at update 2" in shown
    (wanted_common, wanted), (common, tensors) = read(folder, 4), read(tmp_path, 4)
    assert_bitwise(common["opt_param_scheduler"], wanted_common["opt_param_scheduler"])
    assert_bitwise(weights_and_moments(tensors), weights_and_moments(wanted))


@needs_megatron_lm
def test_packed_sequences_on_tensor_and_data_parallel_ranks(tmp_path: Path) -> None:
    train(tmp_path, 2, "--tensor-model-parallel-size", "2", "--rl-use-sequence-packing", ranks=4)
    assert_frozen(tmp_path, before=None, after=2)


@needs_megatron_lm
def test_pipeline_parallel(tmp_path: Path) -> None:
    train(tmp_path, 2, "--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "2")
    assert_frozen(tmp_path, before=None, after=2)


def test_the_example_is_valid(tmp_path: Path) -> None:
    """Megatron's own parser and checks, as the first of 8 ranks; with the wheel of megatron-core alone."""
    tokenizer = save_hugging_face_tokenizer(tmp_path)
    example = {**QUIET, "DRY_RUN": "1", "MEGATRON_LM": "MEGATRON_LM", "HF_DIR": str(tokenizer)}
    shown = run_command(["bash", "examples/megatron_lm/qwen3_8b.sh"], timeout=20, environment=example)
    command = shown.stdout.splitlines()
    flags = command[command.index("MEGATRON_LM/train_rl.py") + 1 :]
    program = ["-m", "megatron_longact.run", "--cpu", str(ROOT / "tests/programs/parse_flags.py")]
    ranks = {**QUIET, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "HF_HUB_OFFLINE": "1"}
    done = run_command([sys.executable, *program, *flags], timeout=100, environment=ranks)
    assert "valid: tp, cp, dp 4 1 2 perform_rl_step True longact True" in done.stdout, done.stderr[-4000:]
