"""Right answers and scores: the figures of OpenBMB/InfiniteBench's `src/compute_scores.py` for the same predictions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from megatron_longact.tasks.infinitebench.prompts import LETTERS, field, task_named

CHOICES = ("code_debug", "longbook_choice_eng")
"""Tasks whose label is the right option and its letter."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",  # noqa: RUF001
)


def label(task: str, item: Mapping[str, Any]) -> Any:
    """The right answer of an item as `score` takes it: its `answer`, of multiple choice the option and its letter.

    Raises ValueError for an unknown task, an item without an answer, and an answer that is none of the four options.
    """
    task_named(task)
    answer = field(item, "answer")
    if task not in CHOICES:
        return answer
    if isinstance(answer, list) and len(answer) == 2 and answer[1] in tuple(LETTERS):
        return answer
    [option] = answer if isinstance(answer, list) and len(answer) == 1 else [answer]
    options = list(field(item, "options"))[: len(LETTERS)]
    if option not in options:
        raise ValueError(f"item {item.get('id', '?')!r} has an answer that is none of its {len(LETTERS)} options")
    return [option, LETTERS[options.index(option)]]


def score(task: str, prediction: str, label: Any) -> float:
    """From 0 to 1, as the official `get_score_one` for every model but GPT-4, whose first number math_calc drops.

    Odd, and as in the official script:

    - passkey, number_string: the first run of the digits 0 to 9 must be the label, as text; minus signs are not seen.
    - kv_retrieval: the label must be a word of its own; a label that is a list is never found.
    - longdialogue_qa_eng: only the first of the names counts, as one word in capitals: a name of two words or with a
      full stop is never found.
    - longbook_choice_eng: a first letter A to D is the answer, also that of "Because"; otherwise what follows the first
      of "answer is:", "answer:", "answer is", "option is" after one character; otherwise the first word out of "ABCD",
      "AB" and "BCD" included.
    - longbook_qa_eng, longbook_qa_chn: the best F1 over the labels, of words and of characters; a label that is one
      string is taken character by character.
    - longbook_sum_eng: rougeLsum of rouge-score without stemming, lines for sentences, the best over the labels.
    - math_find: the first number without its sign, which a label of -5 never equals. A number with a point where the
      label is whole stops the official script; here it is wrong.
    - math_calc: the share of numbers that are right before the first wrong one; signs are not seen here either.
    - code_run: the last word must be the number; "1_000" and "+4" are numbers, "4)" is none.
    - code_debug: "B." and "B:" in front are right, "B" alone is wrong; otherwise what follows the first of "answer
      is:", "is:", "answer:", "correct option is:" after one character: it must begin with the letter or the function,
      so that "Because" is B.

    Raises ValueError for an unknown task and a label that the task cannot have.
    """
    task_named(task)
    return float(_SCORES[task](prediction, label))


def aggregate(task: str, rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean score of a task's predictions, from 0 to 1, as the official script prints it.

    rows: `score`, or else `prediction` (or `pred`) and `ground_truth` (or `label`), the official names in the official
    order. Raises ValueError for no rows or a row without them: the official script scores such a row against a made-up
    label.
    """
    task_named(task)
    if not rows:
        raise ValueError(f"{task}: no predictions to aggregate")
    scores = [row["score"] if "score" in row else score(task, *_prediction_and_label(task, row)) for row in rows]
    return sum(scores) / len(scores)


def check_rouge() -> None:
    """ValueError if the library that scores summaries is not there."""
    if find_spec("rouge_score") is None:
        raise ValueError("longbook_sum_eng is scored by rouge-score, which is not installed: pip install rouge-score")


def _prediction_and_label(task: str, row: Mapping[str, Any]) -> tuple[str, Any]:
    found = []
    for names in (("prediction", "pred"), ("ground_truth", "label")):
        name = next((name for name in names if name in row), None)
        if name is None:
            raise ValueError(f"{task}: a prediction has no {' or '.join(map(repr, names))}: {', '.join(row)}")
        found.append(row[name])
    return found[0], found[1]


def _first(label: Any) -> Any:
    """A label that may stand in a list of its own."""
    return label[0] if isinstance(label, list) and label else label


def _words(text: str, separators: str) -> list[str]:
    return text.translate(dict.fromkeys(map(ord, separators), " ")).split()


def _digits(prediction: str, label: Any) -> bool:
    found = re.search("[0-9]+", prediction)
    return bool(_first(label) == (found[0] if found else ""))


def _key_value(prediction: str, label: Any) -> bool:
    return label in _words(prediction, "\n:\"'.,?!{}")


def _speaker(prediction: str, label: Any) -> bool:
    return label[0] in [word.upper() for word in _words(prediction, "\n:\"'.,?!{}")]


def _choice(prediction: str, label: Any) -> bool:
    prediction = prediction.strip()
    if prediction == "":
        return False
    if prediction[0] in LETTERS:
        return prediction[0] in label
    if prediction in label:
        return True
    text = _one_line(prediction, *"\n\"'.,?!{}")
    answer = _after_prefix(text, "answer is:", "answer:", "answer is", "option is")
    if answer is not None:
        return any(answer.startswith(right) for right in label)
    return next((word in label for word in text.split() if word in LETTERS), False)


def _bug(prediction: str, label: Any) -> bool:
    function, letter = label[0], label[1]
    prediction = prediction.strip()
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = _one_line(prediction, *"\n`'\"-*", "Option", "option")
    answer = _after_prefix(text, "answer is:", "is:", "answer:", "correct option is:")
    return answer is not None and answer.startswith((letter, function))


def _one_line(text: str, *separators: str) -> str:
    """The text with a blank for each separator, and one for each run of blanks."""
    for separator in separators:
        text = text.replace(separator, " ")
    return re.sub(" +", " ", text)


def _after_prefix(text: str, *prefixes: str) -> str | None:
    """What stands behind the first of the prefixes that occurs, less one character; None if none occurs."""
    prefix = next((prefix for prefix in prefixes if prefix in text), None)
    return None if prefix is None else text[text.index(prefix) + len(prefix) + 1 :]


def _f1(prediction: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _english(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _chinese(text: str) -> list[str]:
    """Characters without case, punctuation and blanks."""
    return list("".join(text.lower().translate(_PUNCTUATION).translate(_CHINESE_PUNCTUATION).split()))


def _best_f1(tokens: Callable[[str], list[str]]) -> Callable[[str, Any], float]:
    return lambda prediction, label: max((_f1(tokens(prediction), tokens(right)) for right in label), default=0.0)


def _summary(prediction: str, label: Any) -> float:
    scorer = _rouge()
    scores = scorer.score_multi(label, prediction) if isinstance(label, list) else scorer.score(label, prediction)
    return float(scores["rougeLsum"].fmeasure)


@cache
def _rouge() -> Any:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])


def _number(prediction: str, label: Any) -> bool:
    right = _first(label)
    if not isinstance(right, int | float):
        raise ValueError(f"math_find has {right!r} as its label; it must be a number")
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return False
    return bool((_whole(found[0]) if isinstance(right, int) else float(found[0])) == right)


def _run(prediction: str, label: Any) -> bool:
    words = _words(prediction.strip(), "\n.`'\":")
    number = _whole(words[-1]) if words else None
    return number is not None and bool(_first(label) == number)


def _intermediate_values(prediction: str, label: Any) -> float:
    if not isinstance(label, list) or not label or label[0] == []:
        raise ValueError(f"math_calc has {label!r} as its label; it must be a list of numbers")
    right = label[0] if isinstance(label[0], list) else label
    given = [_whole(number) for number in re.findall("[0-9]+", prediction)]
    agree = [one == other for one, other in zip(right, given, strict=False)]
    return (agree.index(False) if False in agree else len(agree)) / len(right)


def _whole(text: str) -> int | None:
    """A whole number; None for anything else, and for more digits than Python turns into one."""
    try:
        return int(text)
    except ValueError:
        return None


_SCORES: dict[str, Callable[[str, Any], float]] = {
    "passkey": _digits,
    "number_string": _digits,
    "kv_retrieval": _key_value,
    "longdialogue_qa_eng": _speaker,
    "longbook_sum_eng": _summary,
    "longbook_choice_eng": _choice,
    "longbook_qa_eng": _best_f1(_english),
    "longbook_qa_chn": _best_f1(_chinese),
    "math_find": _number,
    "math_calc": _intermediate_values,
    "code_run": _run,
    "code_debug": _bug,
}
