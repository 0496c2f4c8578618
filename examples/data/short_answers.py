"""A reward of one's own: any function `(prompt, response, reference) -> float` in a module that Python finds.

A line of a data set names it `"reward": "short_answers:right_and_short"`.
"""

WORDS = 2
"""An answer may have as many."""


def right_and_short(prompt: str, response: str, reference: str) -> float:
    """1 for an answer that holds the reference, a tenth less for each word too many; 0 without it."""
    words = response.split()
    if reference not in (word.strip(".,") for word in words):
        return 0.0
    return max(0.0, 1.0 - 0.1 * max(0, len(words) - WORDS))
