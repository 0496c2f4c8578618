"""LongBench v2: prompts, truncation, answers and figures as its own scripts have them."""

from __future__ import annotations

import random

import pytest

from megatron_longact.tasks import longbench_v2

ITEM = {
    "_id": "66f",
    "question": " What? ",
    "choice_A": "one ",
    "choice_B": " two",
    "choice_C": "three\n",
    "choice_D": "four",
    "answer": "B",
    "context": "\n A long text. \n",
    "retrieved_context": [{"c_idx": i, "content": f"chunk {i}"} for i in (7, 2, 5)],
}
QUESTION = "What is the correct answer to this question: What?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\n"
FORMAT = 'Format your response as follows: "The correct answer is (insert answer here)".'


def test_prompts_read_as_the_official_ones():
    assert longbench_v2.build_prompt(ITEM) == (
        "Please read the following text and answer the question below.\n\n<text>\nA long text.\n</text>\n\n"
        + QUESTION
        + FORMAT
    )
    assert longbench_v2.build_prompt(ITEM, style="0shot_no_context") == (
        QUESTION + "What is the single, most likely answer choice? " + FORMAT
    )
    cot = longbench_v2.build_prompt(ITEM, style="0shot_cot")
    assert cot.startswith("Please read the following text and answer the questions below.\n\n<text>\nA long text.")
    assert cot.endswith(QUESTION + "Let\u2019s think step by step:")
    answer = longbench_v2.build_prompt(ITEM, style="0shot_cot_ans", reasoning="It is two.")
    assert "The text is too long and omitted here.\n\n" + QUESTION in answer
    assert "Let\u2019s think step by step: It is two.\n\nBased on the above, what" in answer
    assert answer.endswith(FORMAT)


def test_retrieved_chunks_are_the_first_ones_in_the_order_of_the_text():
    prompt = longbench_v2.build_prompt(ITEM, style="0shot_rag", num_chunks=2)
    assert "<text>\nRetrieved chunk 1: chunk 2\n\nRetrieved chunk 2: chunk 7\n</text>" in prompt
    assert prompt.startswith("Please read the following retrieved text chunks and answer")


def test_fields_are_filled_in_one_after_the_other():
    prompt = longbench_v2.build_prompt(ITEM | {"context": "$Q$ costs $C_A$, $DOC$"})
    assert "<text>\nWhat? costs one, $DOC$\n</text>" in prompt


def test_what_a_prompt_lacks_is_named():
    with pytest.raises(ValueError, match="item '66f' has no 'choice_C'"):
        longbench_v2.build_prompt({name: ITEM[name] for name in ITEM if name != "choice_C"})
    with pytest.raises(ValueError, match="unknown prompt style '1shot'"):
        longbench_v2.build_prompt(ITEM, style="1shot")
    with pytest.raises(ValueError, match="num_chunks is 0"):
        longbench_v2.build_prompt(ITEM, style="0shot_rag")


@pytest.mark.parametrize(
    ("length", "limit", "expected"),
    [
        (5, 5, [0, 1, 2, 3, 4]),
        (5, 9, [0, 1, 2, 3, 4]),
        (6, 4, [0, 1, 4, 5]),
        (6, 5, [0, 1, 3, 4, 5]),  # odd: the end has one more
        (6, 1, [5]),
        (0, 3, []),
    ],
)
def test_the_middle_is_cut_out(length, limit, expected):
    assert longbench_v2.truncate(range(length), limit) == expected


def test_truncation_agrees_with_the_official_slices():
    for length in range(12):
        for limit in range(1, 12):
            ids = list(range(length))
            official = ids[: limit // 2] + ids[-limit // 2 :] if length > limit else ids
            assert longbench_v2.truncate(ids, limit) == official
    with pytest.raises(ValueError, match="max_length is 0"):
        longbench_v2.truncate([1], 0)


# What the official pred.py extracted from the same responses.
@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The correct answer is (A)", "A"),
        ("The correct answer is B.", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **(D)**", "D"),
        ("The *correct* answer is (A)", "A"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),  # brackets first
        ("The correct answer is (A) or The correct answer is (B)", "A"),
        ("The correct answer is Denmark", "D"),
        ("The correct answer is (insert answer here)", None),
        ("The correct answer is (E)", None),
        ("the correct answer is (A)", None),
        ("The correct answer is: (A)", None),
        ("The correct answer is  (A)", None),
        ("The correct answer is\n(A)", None),
        ("(A)", None),
        ("A", None),
        ("", None),
        ("Theˑcorrect answer is (A)", None),
    ],
)
def test_answers(response, answer):
    assert longbench_v2.extract_answer(response) == answer


def _rows(*spec: str) -> list[dict[str, object]]:
    """'easy short A B': difficulty, length, prediction (- for none), right answer."""
    rows = []
    for difficulty, length, pred, answer in (each.split() for each in spec):
        given = None if pred == "-" else pred
        rows.append({"difficulty": difficulty, "length": length, "pred": given, "answer": answer})
    return rows


def test_figures_by_bucket():
    rows = _rows(
        "easy short A A", "easy medium B A", "hard long C C", "hard short - D", "hard long - A", "easy long D D"
    )
    assert longbench_v2.aggregate(rows) == {
        "overall": 50.0,
        "easy": 66.7,
        "hard": 33.3,
        "short": 50.0,
        "medium": 0.0,
        "long": 66.7,
    }
    compensated = longbench_v2.aggregate(rows, compensated=True)
    assert (compensated["overall"], compensated["hard"], compensated["short"]) == (58.3, 50.0, 62.5)


def test_the_judge_of_a_row_counts():
    rows = [row | {"judge": True} for row in _rows("easy short A B", "hard short - B")]
    assert longbench_v2.aggregate(rows)["overall"] == 100.0


def test_odd_buckets_and_empty_ones():
    figures = longbench_v2.aggregate(_rows("Easy huge A A"))
    assert figures == {"overall": 100.0, "easy": None, "hard": 100.0, "short": None, "medium": None, "long": 100.0}
    with pytest.raises(ValueError, match="no predictions"):
        longbench_v2.aggregate([])
    with pytest.raises(ValueError, match="prediction 0 has no 'length'"):
        longbench_v2.aggregate([{"difficulty": "easy", "judge": True}])


def test_rounding_is_that_of_the_official_report():
    """503 items as in the benchmark: the figures are those of result.py, round(100 * right / n, 1)."""
    rng = random.Random(0)
    for right in range(0, 504, 37):
        rows = [{"difficulty": "easy", "length": "short", "judge": i < right} for i in range(503)]
        rng.shuffle(rows)
        assert longbench_v2.aggregate(rows)["overall"] == round(100 * right / 503, 1)
