"""Held-out evaluation: pass@k against every subset, rows on real rollouts, and rewards that fail."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_longact.generation.sampling import Sampling
from megatron_longact.rl.pass_at_k import PassAtK, pass_at_k
from megatron_longact.tasks.intervals import wilson
from tests import ranks
from tests.ranks import Layout

SAMPLES = 5


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(samples=samples, correct=correct, k=k) == pytest.approx(expected, rel=1e-15, abs=0)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n independent samples its mean is 1 - (1 - p)^k, whatever n."""
    n, k, p = 9, 4, 0.3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(samples=n, correct=c, k=k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_pass_at_k_of_many_samples_is_exact() -> None:
    assert pass_at_k(samples=10_000, correct=1, k=5_000) == 0.5
    # the product form that is often used: 1 - prod(1 - k / (n - c + 1 .. n)), rounded at each of 200 factors
    product = 1 - np.prod(1 - 100 / np.arange(2000 - 200 + 1, 2000 + 1))
    assert pass_at_k(samples=2000, correct=200, k=100) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_nonsense_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        pass_at_k(samples=samples, correct=correct, k=k)


def test_which_k_are_measured() -> None:
    assert PassAtK().measured == ()
    assert PassAtK(samples=8).measured == (1, 8)
    assert PassAtK(samples=8, ks=(4, 2, 4)).measured == (2, 4)


@dataclass(frozen=True)
class Config:
    """What an evaluation reads of a run."""

    sampling: Sampling
    heldout_prompts: int = 3


def is_even(prompt: str, response: str, reference: Any) -> float:
    """Right by chance, so that samples differ: the sum of the response's letters is even."""
    return float(sum(map(ord, response)) % 2 == 0)


def write_data(path: Path, reward: str, *, n: int = 5) -> Path:
    """Write n prompts of about 8 or 16 tokens, by turns."""
    rows = [{"prompt": "one " * (4 + 4 * (i % 2)) + str(i), "reference": None, "reward": reward} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(path: Path, *, group: Any = None) -> tuple[Any, Any]:
    """An engine on a small model with the demo's vocabulary, and a judge with a data set."""
    from megatron.core import parallel_state

    from megatron_longact.generation.static import StaticRolloutEngine
    from megatron_longact.rl.data.datasets import Dataset
    from megatron_longact.rl.data.environment import DatasetEnvironment
    from megatron_longact.rl.heldout import Judge
    from megatron_longact.tasks.chat import PromptEncoder
    from tests.models import ModelSpec, build
    from tests.tokenizers import DemoTokenizer

    tokenizer = DemoTokenizer()
    dataset = Dataset(path, PromptEncoder(tokenizer), max_prompt_length=40)
    engine = StaticRolloutEngine(
        build(ModelSpec(layers=1, vocab=1024)).chunks[0].module,
        eod=tokenizer.eod,
        vocab_size=1024,
        max_batch_size=16,
        dp_group=parallel_state.get_data_parallel_group(),
    )
    return engine, Judge(DatasetEnvironment(dataset, seed=1), tokenizer.detokenize, group)


def evaluate(path: Path, *, samples: int) -> dict[str, Any]:
    """A row with and without pass@k, and for each prompt which greedy answer and which samples were right."""
    from dataclasses import replace

    from megatron_longact.generation.engine import Prompt
    from megatron_longact.rl.heldout import SAMPLING_STEP, evaluate_heldout, heldout_scalars

    engine, judge = parts(path)
    config = Config(Sampling(max_response_length=4, seed=2))
    pass_at = PassAtK(samples=samples, ks=(1, 3, samples), temperature=0.8)
    row = evaluate_heldout(engine, judge, config, iteration=7, pass_at=pass_at)
    tasks = [t for n in judge.environment.heldout_lengths for t in judge.environment.heldout_tasks(n, count=3)]
    right = []
    for i, task in enumerate(tasks):
        greedy = engine.generate([Prompt(task.prompt, i)], replace(config.sampling, greedy=True))
        sampling = replace(config.sampling, temperature=0.8, step=SAMPLING_STEP)
        made = [engine.generate([Prompt(task.prompt, i, j)], sampling) for j in range(samples)]
        right.append([judge.score([task], rollouts)[0].correct for rollouts in (greedy, *made)])
    return {
        "row": row,
        "plain": evaluate_heldout(engine, judge, config, iteration=7),
        "again": evaluate_heldout(engine, judge, config, iteration=7, pass_at=pass_at),
        "lengths": judge.environment.heldout_lengths,
        "right": right,
        "scalars": heldout_scalars(row),
    }


def test_rows_hold_greedy_accuracy_and_pass_at_k_by_length(tmp_path: Path) -> None:
    path = write_data(tmp_path / "d.jsonl", "tests.test_rl_evaluation:is_even")
    [got] = ranks.run(evaluate, path=path, samples=SAMPLES)
    row, right = got["row"], got["right"]
    short, long = map(str, got["lengths"])
    sizes = {short: slice(0, 3), long: slice(3, 5)}  # three and two prompts of five

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert row["prompts"] == len(right) == 5
    assert row["accuracy"] == row["reward"] == mean([greedy for greedy, *_ in right])
    assert row["accuracy_by_length"] == {n: mean([greedy for greedy, *_ in right[s]]) for n, s in sizes.items()}
    for k in (1, 3, SAMPLES):
        values = [mean([any(s) for s in itertools.combinations(samples, k)]) for _, *samples in right]
        assert row["pass_at_k"][str(k)] == pytest.approx(mean(values), rel=1e-12)
        assert row["pass_at_k_interval"][str(k)] == pytest.approx(wilson(mean(values), 5), rel=1e-12)
        for n, s in sizes.items():
            assert row["pass_at_k_by_length"][n][str(k)] == pytest.approx(mean(values[s]), rel=1e-12)
    assert 0 < row["pass_at_k"]["1"] < 1  # or the samples would say nothing
    assert row == got["again"]
    assert got["plain"] == {name: value for name, value in row.items() if not name.startswith("pass")}
    assert list(got["plain"]) == [
        "iteration",
        "accuracy",
        "reward",
        "accuracy_by_length",
        "accuracy_interval",
        "accuracy_interval_by_length",
        "reward_by_task",
        "prompts",
        "prompts_by_length",
        "truncated_fraction",
        "empty_fraction",
        "rewards",
        "correct",
    ]
    assert row["prompts_by_length"] == {short: 3, long: 2}
    assert row["correct"] == [greedy for greedy, *_ in right]
    low, high = row["accuracy_interval_by_length"][long]
    assert 0 <= low <= row["accuracy_by_length"][long] <= high <= 1
    assert got["scalars"]["heldout/accuracy"] == row["accuracy"]
    assert got["scalars"][f"heldout/accuracy@{short}"] == row["accuracy_by_length"][short]
    assert got["scalars"]["heldout/pass@3"] == row["pass_at_k"]["3"]
    assert got["scalars"][f"heldout/pass@3@{long}"] == row["pass_at_k_by_length"][long]["3"]


def raises_on_three(prompt: str, response: str, reference: Any) -> float:
    """Cannot judge the fourth prompt."""
    return 1.0 / 0.0 if prompt.endswith("3") else 1.0


def is_none_on_three(prompt: str, response: str, reference: Any) -> float | None:
    """Forgets to return something for the fourth prompt."""
    return None if prompt.endswith("3") else 1.0


def score_all(path: Path, *, shared: bool) -> dict[str, Any]:
    """Judge two responses to each prompt; the scores, or the error and what it is chained to."""
    import torch.distributed as dist

    from megatron_longact.generation.engine import Prompt

    engine, judge = parts(path, group=dist.group.WORLD if shared else None)
    tasks = judge.environment.training_tasks(0, count=5) * 2
    prompts = [Prompt(task.prompt, i) for i, task in enumerate(tasks)]
    rollouts = engine.generate(prompts, Sampling(max_response_length=4))
    try:
        return {"scores": judge.score(tasks, rollouts), "judged": sorted(map(str, JUDGED))}
    except RuntimeError as error:
        return {"error": str(error), "cause": repr(error.__cause__)}


@pytest.mark.parametrize(
    ("reward", "said", "cause"),
    [
        ("raises_on_three", "ZeroDivisionError: float division by zero", "ZeroDivisionError"),
        ("is_none_on_three", "returned None (NoneType), which is not a finite number", "ValueError"),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_reward_that_fails_names_its_line_on_every_rank(
    reward: str, said: str, cause: str, shared: bool, tmp_path: Path
) -> None:
    path = write_data(tmp_path / "d.jsonl", f"tests.test_rl_evaluation:{reward}")
    results = ranks.run(score_all, path=path, shared=shared, world_size=2)
    for result in results:
        assert f"{path}:4, response " in result["error"]
        assert said in result["error"]
        assert "\n" not in result["error"]
    assert any(result["cause"].startswith(cause) for result in results)


JUDGED: list[int] = []


def differs_by_rank(prompt: str, response: str, reference: Any) -> float:
    """A reward that is not a function of its arguments, such as another model's opinion."""
    import torch.distributed as dist

    JUDGED.append(len(JUDGED))
    return float(dist.get_rank())


def forget() -> None:
    """Judge anew."""
    JUDGED.clear()


def test_ranks_share_the_judging_and_agree(tmp_path: Path) -> None:
    path = write_data(tmp_path / "d.jsonl", "tests.test_rl_evaluation:differs_by_rank")
    ranks.run(forget, world_size=2)
    first, second = ranks.run(score_all, path=path, shared=True, layout=Layout(tp=2), world_size=2)
    assert first["scores"] == second["scores"]
    assert [score.reward for score in first["scores"]] == [0.0, 1.0] * 5
    assert len(first["judged"]) == len(second["judged"]) == 5
