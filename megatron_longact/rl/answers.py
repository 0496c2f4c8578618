"""What the model says: a row for an answer, in rollouts.jsonl and heldout.jsonl, and some as text in TensorBoard.

docs/data.md has the fields.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from megatron_longact.generation.engine import Rollouts
from megatron_longact.reporting.run_log import HELDOUT, ROLLOUTS, RunLog
from megatron_longact.rl.batches.rollout_batch import RolloutBatch
from megatron_longact.rl.config import ALL, AnswerFlags
from megatron_longact.rl.data.environment import Score, Task

_IN_TENSORBOARD = 8
_SHOWN_CHARACTERS = 2000


class AnswerLog:
    """Writes answers, on the process that writes the run's files and the one that has TensorBoard; else does nothing.

    detokenize: as the rewards see a response. iteration: says how many optimizer steps are done.
    """

    def __init__(
        self, flags: AnswerFlags, log: RunLog, *, detokenize: Callable[[list[int]], str], iteration: Callable[[], int]
    ) -> None:
        self._flags = flags
        self._log = log
        self._detokenize = detokenize
        self._iteration = iteration

    def rollouts(self, batch: RolloutBatch, tasks: Sequence[Task], *, first: int, used: Tensor) -> None:
        """Of a sampling round: tasks: one a group, the first of which is the `first` of its step; used: bool [groups].

        Their iteration is that of the first optimizer step that trains on them, as in metrics.jsonl.
        """
        group = len(batch) // len(tasks)

        def row(i: int) -> dict[str, Any]:
            own = batch.lengths[i] - batch.finished[i].long()
            return {
                "step": batch.step,
                "prompt": first + i // group,
                "sample": i % group,
                **self._of(tasks[i // group], batch.responses[i, :own].tolist(), finished=bool(batch.finished[i])),
                "reward": round(float(batch.rewards[i]), 6),
                "correct": bool(batch.correct[i]),
                "advantage": round(float(batch.advantages[i]), 6),
                "used": bool(used[i // group]),
            }

        self._write(ROLLOUTS, row, self._flags.rollouts, len(batch), iteration=self._iteration() + 1, seed=batch.step)

    def heldout(
        self, tasks: Sequence[Task], rollouts: Rollouts, scores: Sequence[Score], *, lengths: Sequence[int]
    ) -> None:
        """Of the greedy answers of an evaluation; lengths: the context length that each task counts at."""

        def row(i: int) -> dict[str, Any]:
            return {
                "prompt": i,
                "length": lengths[i],
                **self._of(tasks[i], rollouts.response(i), finished=bool(rollouts.finished[i])),
                "reward": scores[i].reward,
                "correct": scores[i].correct,
            }

        self._write(HELDOUT, row, self._flags.heldout, len(tasks), iteration=self._iteration(), seed=0)

    def _of(self, task: Task, response: list[int], *, finished: bool) -> dict[str, Any]:
        end = list(task.prompt[len(task.prompt) - min(self._flags.prompt_tokens, len(task.prompt)) :])
        return {
            "task": task.name,
            "source": task.source,
            "prompt_tokens": len(task.prompt),
            "prompt_end": self._detokenize(end) if end else "",
            "response": self._detokenize(response) if response else "",
            "response_tokens": len(response) + finished,
            "ended": "eod" if finished else "length",
            "reference": json.loads(json.dumps(task.answer, default=str)),
        }

    def _write(
        self, name: str, row: Callable[[int], dict[str, Any]], asked: str, total: int, *, iteration: int, seed: int
    ) -> None:
        if not self._log.writes:
            return
        rows = [row(i) for i in spread_out(total, total if asked == ALL else int(asked), seed=seed)]
        text = as_markdown([rows[i] for i in spread_out(len(rows), _IN_TENSORBOARD, seed=seed)])
        self._log.write_answers(name, rows, text, iteration=iteration)


def spread_out(total: int, count: int, *, seed: int) -> list[int]:
    """`count` of the numbers below `total`, or all, one out of each of `count` equal parts, drawn by the seed."""
    count, rng = min(count, total), random.Random(seed)
    edges = [i * total // count for i in range(count + 1)] if count else []
    return [rng.randrange(low, high) for low, high in pairwise(edges)]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Answers as TensorBoard's text tab shows them: what was said stands there letter by letter."""
    parts = []
    for row in rows:
        parts += [
            f"**{row['task']}, prompt {row['prompt']}**: {'right' if row['correct'] else 'wrong'}, reward "
            f"{row['reward']:.3g}, {row['response_tokens']} tokens, ended by {row['ended']}; wanted:",
            _indented(json.dumps(row["reference"], ensure_ascii=False)),
            f"the end of its {row['prompt_tokens']} tokens:",
            _indented(row["prompt_end"][-_SHOWN_CHARACTERS:]),
            "answer:",
            _indented(row["response"][:_SHOWN_CHARACTERS]),
        ]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or " ").split("\n"))
