"""Reward functions: what they give, and how a function of one's own is found."""

import importlib
import sys
import time
from decimal import Decimal
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longact.rl.data.rewards import REWARDS, find_reward, finite_reward

_modules = count()


def of(name: str, response: str, reference: object) -> float:
    return find_reward(name)("the prompt", response, reference)


@pytest.mark.parametrize(
    ("name", "response", "reference", "expected"),
    [
        ("exact-match", " Paris\n", "Paris", 1),
        ("exact-match", "paris", "Paris", 0),
        ("exact-match", "Lyon", ["Paris", "Lyon "], 1),
        ("contains-all", "It is PARIS, or Lyon.", ["paris", "lyon", "Nice"], 2 / 3),
        ("contains-all", "", "Paris", 0),
        ("contains-any", "It is PARIS.", ["paris", "lyon"], 1),
        ("contains-any", "Nice", ["paris", "lyon"], 0),
        ("numeric", "3 apples and 4 pears make 7.", 7, 1),
        ("numeric", "So 1,234.50 in all", "1234.5", 1),
        ("numeric", "1,2345", 2345, 1),
        ("numeric", "\\boxed{42}, because 6 * 7 = 42 and not 43", "42", 1),
        ("numeric", "#### -5", -5, 1),
        ("numeric", "\N{MINUS SIGN}5", -5, 1),
        ("numeric", "3-4", 4, 1),
        ("numeric", "about .5", 0.5, 1),
        ("numeric", "6.02e23", 6.02e23, 1),
        ("numeric", "0.33333333", "0.333333333", 1),
        ("numeric", "0.3333", "0.333333333", 0),
        ("numeric", "seven", 7, 0),
        ("numeric", "", 0, 0),
        ("numeric", r"First \boxed{3}. Wait. \boxed{\frac{7}{2}}.", "3", 0),
        ("numeric", r"First \boxed{3}. Wait. \boxed{\frac{7}{2}}.", "3.5", 1),
        ("numeric", r"\boxed{\text{42}} after 7 steps", "42", 1),
        ("numeric", r"\boxed{1{,}234}", "1234", 1),
        ("numeric", r"\boxed{3{,}5}", "3.5", 1),
        ("numeric", r"\boxed{1\,234\,567}", "1234567", 1),
        ("numeric", r"\boxed{42\text{ cm}^{2}}", "42", 1),
        ("numeric", r"\boxed{60\,\mathrm{km}/\mathrm{h}}", "60", 1),
        ("numeric", r"\boxed{90^\circ}", "90", 1),
        ("numeric", r"\boxed{50\%}", "50", 1),
        ("numeric", r"\boxed{\$42}", "42", 1),
        ("numeric", r"\boxed{\frac{1}{2}}", "2", 0),
        ("numeric", r"\boxed{\frac{1}{2}}", "0.5", 1),
        ("numeric", r"\boxed{-\dfrac{1}{2}}", "-0.5", 1),
        ("numeric", r"\boxed{\tfrac{-1}{2}}", "-0.5", 1),
        ("numeric", r"\boxed{\frac12}", r"\frac{1}{2}", 1),
        ("numeric", r"\boxed{3\frac{1}{2}}", "3.5", 1),
        ("numeric", r"\boxed{\frac{\frac{1}{2}}{3}}", "1/6", 1),
        ("numeric", r"\boxed{1/2}", "2", 0),
        ("numeric", r"\boxed{1/2}", "0.5", 1),
        ("numeric", r"\boxed{12/25/2024}", "2024", 1),
        ("numeric", r"\boxed{6.02 \times 10^{23}}", 6.02e23, 1),
        ("numeric", r"\boxed{2^{10}}", 1024, 1),
        ("numeric", r"\boxed{x_{1} = 5}", 5, 1),
        ("numeric", r"\boxed{\left(\frac{3}{4}\right)}", 0.75, 1),
        ("numeric", r"\boxed{\sqrt{2}}", 2, 0),
        ("numeric", r"\boxed{2\pi}", 2, 0),
        ("numeric", r"\boxed{\frac{x}{2}}", 2, 0),
        ("numeric", r"\boxed{\frac{1}{0}}", 0, 0),
        ("numeric", r"\boxed{{{5}}} of 7", 5, 1),
        ("numeric", r"\boxed{3}, no: \boxed{\text{none}}", 3, 0),
        ("numeric", r"\boxed{3}, no: \boxed{\frac{7}{2", 3, 0),
        ("numeric", r"\boxed{3}, no: \boxed{\frac{7}{2", 2, 0),
        ("numeric", r"\boxed{3}, as asked in \boxed{}", 3, 1),
        ("numeric", r"\fbox{\boxed{7}} in 8", 7, 1),
        ("numeric", r"$\boxed 5$ of 8", 5, 1),
        ("numeric", r"\boxed -\frac{1}{2} of 8", -0.5, 1),
        ("numeric", r"it is $\frac{7}{2}$.", 3.5, 1),
        ("numeric", r"it is $\frac{7}{2}$.", 2, 0),
        ("multiple-choice", "The correct answer is (B).", "B", 1),
        ("multiple-choice", "**Answer:** C", "C", 1),
        ("multiple-choice", "The answer is A? No: the answer is option D", "D", 1),
        ("multiple-choice", "(A) is wrong, so it must be (B)", "b", 1),
        ("multiple-choice", "The answer: (B). (A) is wrong.", "B", 1),
        ("multiple-choice", " B\n", "B", 1),
        ("multiple-choice", "B. because of that", "B", 1),
        ("multiple-choice", "\\boxed{C}", "C", 1),
        ("multiple-choice", r"The answer is \boxed{\text{B}}", "B", 1),
        ("multiple-choice", r"The answer is A. \boxed{\textbf{(B)}}", "B", 1),
        ("multiple-choice", r"\boxed{\mathrm{B.}\ 42}, not (C)", "B", 1),
        ("multiple-choice", r"\boxed{A}, or rather \boxed{\text{B}}", "A", 0),
        ("multiple-choice", r"\fbox{D}", "D", 1),
        ("multiple-choice", r"\boxed D", "D", 1),
        ("multiple-choice", r"\boxed{42}, so the answer is (B)", "B", 1),
        ("multiple-choice", r"\boxed{\text{A dog}}", "A", 0),
        ("multiple-choice", "A dog", "A", 0),
        ("multiple-choice", "The answer is a dog", "A", 0),
        ("multiple-choice", "", "A", 0),
        ("f1", "The cat sat.", "a cat sat", 1),
        ("f1", "the black cat", "cat", 2 / 3),
        ("f1", "a cat cat", ["dog", "cat cat cat"], 4 / 5),
        ("f1", "", "cat", 0),
        ("needle", " 12, 99.", ["12", "56"], 1 / 3),
        ("needle", " 12, 56.", ["12", "56"], 1),
    ],
)
def test_built_in_rewards(name: str, response: str, reference: object, expected: float) -> None:
    assert of(name, response, reference) == pytest.approx(expected, rel=1e-12)  # fractions of small integers


@pytest.mark.parametrize(
    "response",
    [
        "\\frac{" * 20000,
        "\\boxed{" * 20000,
        "\\boxed{" + "{" * 20000 + "5" + "}" * 20001,
        "\\boxed{" + "9" * 20000 + "}",
        "\\boxed{" + "1/" * 20000 + "}",
        "\\boxed{10^{999999999}}",
        "\\boxed{0^{-1}}",
    ],
)
def test_a_response_that_repeats_itself_costs_no_more_than_its_length(response: str) -> None:
    begun = time.process_time()
    assert of("numeric", response, 3) == of("multiple-choice", response, "B") == 0
    assert time.process_time() - begun < 5  # milliseconds; minutes where it grows with the square


@pytest.mark.parametrize("name", sorted(REWARDS))
@given(response=st.text() | st.text(alphabet="\\{}^_/,.~$ 0123frac").map("\\boxed{{{}}}".format))
def test_any_response_gets_a_reward_in_0_to_1(name: str, response: str) -> None:
    reference = {"numeric": 3, "multiple-choice": "B"}.get(name, ["B", "3"])
    assert 0 <= finite_reward(of(name, response, reference), name=name) <= 1


@pytest.mark.parametrize("name", sorted(REWARDS))
@pytest.mark.parametrize("reference", [None, [], {}, [3], "  ", True, [""]])
def test_a_reference_that_cannot_be_judged_with_is_refused(name: str, reference: object) -> None:
    with pytest.raises(ValueError, match="the reference is "):
        of(name, "", reference)


@pytest.mark.parametrize("reference", ["no number", "1 or 2", float("nan"), "1e999", 10**400, r"\sqrt{2}"])
def test_numeric_wants_one_finite_number(reference: object) -> None:
    with pytest.raises(ValueError, match="must be a finite number"):
        of("numeric", "1", reference)


def write_module(folder: Path, code: str) -> str:
    """A module with a name that no other test has."""
    name = f"reward_of_test_{next(_modules)}"
    (folder / f"{name}.py").write_text(code)
    importlib.invalidate_caches()
    return name


def test_a_function_of_ones_own_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    name = write_module(
        tmp_path, "def longest(prompt, response, reference):\n    return len(response) / reference['n']\n"
    )
    assert of(f"{name}:longest", "four", {"n": 8}) == 0.5
    assert find_reward(f"{name}:longest") is sys.modules[name].longest


@pytest.mark.parametrize(
    ("code", "function", "said"),
    [
        (
            "def f(prompt, response): return 1.0",
            "f",
            r"must take \(prompt, response, reference\), not \(prompt, response\)",
        ),
        ("f = 3", "f", "has no function 'f'"),
        ("", "g", "has no function 'g'"),
        ("import a_module_that_is_not_there", "f", "ModuleNotFoundError: .*a_module_that_is_not_there"),
        ("def f(:", "f", "SyntaxError"),
        ("raise SystemExit(0)", "f", "SystemExit"),
    ],
)
def test_what_is_no_reward_function_is_refused_in_one_line(
    code: str, function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        find_reward(f"{write_module(tmp_path, code)}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["exact", "", ":f", "module:"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown reward .* known: exact-match, contains-all"):
        find_reward(name)


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1.0", float("nan"), float("inf"), [1.0], {"score": 1.0}, 1j, 10**400, Decimal("snan")),
        *(np.array([1.0, 2.0]), np.array([]), np.array(np.nan), np.array("1"), np.str_("1"), np.array(None)),
        *(torch.tensor([1.0, 2.0]), torch.tensor(float("inf")), torch.tensor(1j)),
    ],
)
def test_what_is_no_finite_number_is_no_reward(value: object) -> None:
    with pytest.raises(ValueError, match=r"the reward 'mine' returned .* not a finite number"):
        finite_reward(value, name="mine")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((1, 1), (True, 1), (0.25, 0.25), (-3.5, -3.5), (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5)),
        *((np.isclose(1, 1), 1), (np.int64(3), 3), (np.float16(0.5), 0.5), (np.array(2.0), 2), (np.array([[2]]), 2)),
        *((torch.tensor(True), 1), (torch.tensor([0.5]), 0.5), (torch.tensor(1.0, requires_grad=True), 1)),
    ],
)
def test_whatever_is_one_finite_number_is_a_reward(value: object, expected: float) -> None:
    reward = finite_reward(value, name="mine")
    assert type(reward) is float
    assert reward == expected
