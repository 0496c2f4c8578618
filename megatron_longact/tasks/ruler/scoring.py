"""RULER's scores, the same figures as NVIDIA/RULER's `scripts/eval/evaluate.py` on the same predictions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_longact.tasks.ruler.tasks import Metric, task_named

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")


def postprocess(task: str, prediction: str) -> str:
    r"""The prediction as it is scored: stripped, control characters turned into newlines, stripped again.

    Odd, and as in the official script: "non-printable" there means \x00 to \x1f, so a tab becomes a newline, and
    \x7f and what Unicode has beyond stay. All tasks are treated alike. Doing it twice changes nothing.
    Raises ValueError for an unknown task.
    """
    task_named(task)
    return _CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def score(task: str, predictions: Sequence[str], references: Sequence[Sequence[Any]]) -> float:
    """Percent with two decimals, as the official script reports it; predictions are postprocessed first.

    references: for each prediction, its list of right answers. The QA tasks count a prediction that holds any of
    them, the others the share that it holds. Odd, and as in the official script: case is ignored, a reference
    counts wherever it stands, also inside a longer word or number, an empty reference is always found, and a
    prediction that lists everything is right. No predictions at all, or a first reference that is None (a test
    set without answers), give 0.0.

    Raises ValueError for an unknown task, for lists of different length and for a sample without references.
    """
    metric = task_named(task).metric
    if len(predictions) != len(references):
        raise ValueError(f"{task}: {len(predictions)} predictions, but references for {len(references)}")
    empty = [i for i, sample in enumerate(references) if len(sample) == 0]
    if empty:
        raise ValueError(f"{task}: sample {empty[0]} has no references; each needs at least one")
    if not references or references[0][0] is None:
        return 0.0
    predictions = [postprocess(task, prediction) for prediction in predictions]
    found = [_found(p, sample, metric) for p, sample in zip(predictions, references, strict=True)]
    return round(sum(found) / len(predictions) * 100, 2)


def count_nulls(task: str, predictions: Sequence[str]) -> int:
    """How many predictions are empty, which the official script reports beside the score."""
    return sum(not postprocess(task, prediction) for prediction in predictions)


def _found(prediction: str, references: Sequence[str], metric: Metric) -> float:
    hits = [1.0 if reference.lower() in prediction.lower() else 0.0 for reference in references]
    return max(hits) if metric == "part" else sum(hits) / len(hits)
