"""The twelve tasks and their prompts.

Source: OpenBMB/InfiniteBench, `src/prompt.py` and `src/eval_utils.py`. The official scripts have four sets of
templates, one for GPT-4, one for Claude 2, one for Kimi, and `yarn_mistral_templates`, with which they ask every open
model (YaRN-Mistral, Yi, ChatGLM3). It is that set here, to the character, so that numbers compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Category = Literal["retrieval", "books and dialogues", "mathematics", "code"]
LETTERS = "ABCD"

_OPTIONS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\n"


@dataclass(frozen=True)
class Task:
    """One task; fields in braces of its template are filled in for each item. title: its name in the paper."""

    name: str
    title: str
    category: Category
    tokens_to_generate: int
    template: str


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "passkey",
            "Retrieve.PassKey",
            "retrieval",
            6,
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
            "you about the important information.\n\n{context}\n\n{input}\n\nThe pass key is",
        ),
        Task(
            "number_string",
            "Retrieve.Number",
            "retrieval",
            12,
            "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
            "important information there.\n\n{context}\n\n{input}\n\nThe sequence of digits is",
        ),
        Task(
            "kv_retrieval",
            "Retrieve.KV",
            "retrieval",
            50,
            "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        ),
        Task(
            "longdialogue_qa_eng",
            "En.Dia",
            "books and dialogues",
            40,
            "Below is a dialogue script where one random occurrence of a character name is replaced with "
            '"$$MASK$$", and you should try to guess who that character is.\n\n{context}\n\n'
            "The name that has been replaced with $$MASK$$ is likely",
        ),
        Task(
            "longbook_sum_eng",
            "En.Sum",
            "books and dialogues",
            1200,
            "Summarize the book below.\n\n{context}\n\nSummary:",
        ),
        Task(
            "longbook_choice_eng",
            "En.MC",
            "books and dialogues",
            40,
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n"
            f"{_OPTIONS}The letter of the correct answer is",
        ),
        Task(
            "longbook_qa_eng",
            "En.QA",
            "books and dialogues",
            40,
            "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
            "Question: {question}\nAnswer:",
        ),
        Task(
            "longbook_qa_chn",
            "Zh.QA",
            "books and dialogues",
            40,
            "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{question}\n答案：",  # noqa: RUF001
        ),
        Task("math_find", "Math.Find", "mathematics", 3, "{prefix}\n\n{context}\n\n{input}"),
        Task(
            "math_calc",
            "Math.Calc",
            "mathematics",
            30000,
            "Let us calculate the intermediate values of an expression.\n\n"
            "Expression: 1 + 3 + 4\nValues: [1, 4, 8]\n\nExpression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\n"
            "Expression: {context}\nValues:",
        ),
        Task(
            "code_run",
            "Code.Run",
            "code",
            5,
            "There is a function called {func} in the following Python code.\n\n{context}\n\n"
            "Please compute the exact value of {func_call}. The value of {func_call} is",
        ),
        Task(
            "code_debug",
            "Code.Debug",
            "code",
            5,
            "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes "
            f"it crash.\n\n{{context}}\n\nOptions:\n{_OPTIONS}The correct option is:",
        ),
    )
}
"""By name, in the order of the official `compute_scores.py`."""


def task_named(name: str) -> Task:
    """The task of `TASKS`; ValueError with the known names for any other."""
    if name not in TASKS:
        raise ValueError(f"unknown InfiniteBench task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def build_prompt(task: str, item: Mapping[str, Any]) -> str:
    """The prompt of an item, as the official scripts ask open models.

    Odd, and as there: code_run asks for the first call of a `func_` with one whole number that `input` names;
    math_find repeats in front what `input` says between "The" and its last "of" on that line, in lower case; options
    beyond the fourth are left out; retrieval tasks take `content` for `context` where an item has it.

    Raises ValueError for an unknown task and an item that lacks what its prompt needs.
    """
    asked = task_named(task)
    context = "content" if asked.category == "retrieval" and "content" in item else "context"
    fields = set(re.findall(r"{(\w+)}", asked.template)) - {"context"}
    return asked.template.format(context=field(item, context), **{name: _VALUES[name](item) for name in fields})


def field(item: Mapping[str, Any], name: str) -> Any:
    """A field of an item; ValueError if it has none."""
    if name not in item:
        raise ValueError(f"item {item.get('id', '?')!r} has no {name!r}")
    return item[name]


def _option(place: int, item: Mapping[str, Any]) -> Any:
    options = field(item, "options")
    if len(options) < len(LETTERS):
        raise ValueError(f"item {item.get('id', '?')!r} has {len(options)} options; it needs {len(LETTERS)}")
    return options[place]


def _call(item: Mapping[str, Any]) -> str:
    calls = re.findall(r"func_[0-9]+\(-?[0-9]+\)", field(item, "input"))
    if not calls:
        raise ValueError(f"item {item.get('id', '?')!r} names no call such as func_7(-3) in its 'input'")
    return str(calls[0])


def _prefix(item: Mapping[str, Any]) -> str:
    asked = re.findall(r"The .+ of", field(item, "input"))
    if not asked:
        raise ValueError(f"item {item.get('id', '?')!r} does not say 'The ... of' in its 'input'")
    return f"What is {asked[0].lower()[: -len(' of')]} in the following list?"


_VALUES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "input": lambda item: field(item, "input"),
    "question": lambda item: field(item, "input"),
    "func": lambda item: _call(item).split("(")[0],
    "func_call": _call,
    "prefix": _prefix,
    **{f"OPTION_{letter}": partial(_option, place) for place, letter in enumerate(LETTERS)},
}
