"""Reward functions: `(prompt, response, reference) -> float`, found by name or as `module:function`.

prompt: what the model read, as text, a chat template included; response: what it wrote, without the end-of-text
token; reference: the data set's own value, any JSON. A reward that cannot judge with a reference raises; the name
of the sample is put around it by the caller.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import cache
from numbers import Real
from types import ModuleType
from typing import Any

from megatron_longact.rl.data.latex import last_boxed, numbers_in_prose, numbers_of, plain_text, with_fractions
from megatron_longact.tasks import needle as tasks

RewardFunction = Callable[[str, str, Any], float]

RELATIVE, ABSOLUTE = 1e-6, 1e-9
"""How near a number must come to the reference: what six significant digits need."""

_BOXED_CHOICE = re.compile(r"\W*([A-Z])(?:[).:,]|\W*$)")
_CHOICES = (
    re.compile(r"(?i:\banswer)\W*(?i:is|option|choice)?\W*(?i:option|choice)?\W*([A-Z])\b(?!')"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"^\W*([A-Z])(?:[).:,]|\W*$)"),
)
"""Where the letter of an answer stands without a box, best first; of several matches the last one counts."""


def exact_match(prompt: str, response: str, reference: Any) -> float:
    """1 if the response is a reference, apart from white space at both ends; reference: a string or several."""
    return float(response.strip() in [wanted.strip() for wanted in _strings(reference)])


def contains_all(prompt: str, response: str, reference: Any) -> float:
    """Share of the references that occur in the response; case does not count.

    RULER's string match (arXiv 2404.06654). A response that lists everything gets full marks: see `needle`.
    """
    found = _found(response, reference)
    return sum(found) / len(found)


def contains_any(prompt: str, response: str, reference: Any) -> float:
    """1 if a reference occurs in the response; case does not count. RULER's match for questions and answers."""
    return float(any(_found(response, reference)))


def numeric(prompt: str, response: str, reference: Any) -> float:
    r"""1 if the response's answer is the reference: the number in its last \boxed{}, else its last number.

    LaTeX is read (`latex`). A box that is not closed, or has no number that can be read, is an answer that is wrong.
    """
    wanted = _reference_number(reference)
    boxed = last_boxed(response)
    given = numbers_in_prose(with_fractions(response)) if boxed is None else numbers_of(boxed)
    return float(bool(given) and math.isclose(given[-1], wanted, rel_tol=RELATIVE, abs_tol=ABSOLUTE))


def multiple_choice(prompt: str, response: str, reference: Any) -> float:
    r"""1 if the response chooses the reference's letter: \boxed{B}, "The answer is (B)", "... (B)", "B." or "B"."""
    if not (isinstance(reference, str) and re.fullmatch(r"[A-Za-z]", reference.strip())):
        raise ValueError(f"the reference is {_shown(reference)}; multiple choice needs one letter")
    boxed = _BOXED_CHOICE.match(last_boxed(response) or "")
    if boxed:
        return float(boxed[1] == reference.strip().upper())
    for pattern in _CHOICES:
        found = pattern.findall(response)
        if found:
            return float(found[-1] == reference.strip().upper())
    return 0.0


def f1(prompt: str, response: str, reference: Any) -> float:
    """Largest F1 of words over the references, without case, punctuation and articles (SQuAD, arXiv 1606.05250)."""
    return max(_f1(_words(response), _words(wanted)) for wanted in _strings(reference))


def needle(prompt: str, response: str, reference: Any) -> float:
    """Numbers that are right over numbers that are right, wrong or missing; see `tasks.reward`."""
    return tasks.reward(response, _strings(reference))


REWARDS: dict[str, RewardFunction] = {
    "exact-match": exact_match,
    "contains-all": contains_all,
    "contains-any": contains_any,
    "numeric": numeric,
    "multiple-choice": multiple_choice,
    "f1": f1,
    "needle": needle,
}


@cache
def find_reward(name: str) -> RewardFunction:
    """The reward function of that name, or the one that `module:function` points to.

    The module is looked for where Python looks, and in the current folder. Raises ValueError for what is not there,
    cannot be imported, or does not take `(prompt, response, reference)`.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(REWARDS)
        raise ValueError(f"unknown reward {name!r}; known: {known}; one of your own is given as module:function")
    function = getattr(_imported(module, reward=name), attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name!r}: the module {module!r} has no function {attribute!r}")
    _check_signature(function, reward=name)
    return function


def finite_reward(value: Any, *, name: str) -> float:
    """`value` as a float; ValueError if it is not one finite number.

    A number is whatever is one by itself, arrays and tensors of one element included (they have an `item()`).
    """
    number = value
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        with suppress(Exception):  # of several elements, or of something else's own
            number = value.item()
    with suppress(OverflowError, ValueError):  # an integer that is too large for a float, a signalling NaN
        if isinstance(number, Real | Decimal) and math.isfinite(number):
            return float(number)
    raise ValueError(f"the reward {name!r} returned {_shown(value)}, which is not a finite number")


def _imported(module: str, *, reward: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # the launcher puts the program's folder where Python has the current one
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward {reward!r}: the module {module!r} cannot be imported from the current folder or PYTHONPATH "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_signature(function: Callable[..., Any], *, reward: str) -> None:
    try:
        inspect.signature(function).bind("", "", None)
    except TypeError as error:
        raise ValueError(
            f"reward {reward!r} must take (prompt, response, reference), not {inspect.signature(function)}"
        ) from error


def _strings(reference: Any) -> Sequence[str]:
    strings = [reference] if isinstance(reference, str) else reference
    if not (isinstance(strings, list | tuple) and strings and all(isinstance(s, str) and s.strip() for s in strings)):
        raise ValueError(f"the reference is {_shown(reference)}; it must be a string, or a list of strings, not empty")
    return strings


def _found(response: str, reference: Any) -> list[bool]:
    return [wanted.lower() in response.lower() for wanted in _strings(reference)]


def _reference_number(reference: Any) -> float:
    numbers = numbers_of(plain_text(reference)) if isinstance(reference, str) else [reference]
    good = len(numbers) == 1 and isinstance(numbers[0], int | float) and not isinstance(numbers[0], bool)
    with suppress(OverflowError):  # an integer that is too large for a float
        if good and math.isfinite(numbers[0]):
            return float(numbers[0])
    raise ValueError(f"the reference is {_shown(reference)}; it must be a finite number, or a string with one")


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 80 else shown[:77] + '...'} ({type(value).__name__})"
