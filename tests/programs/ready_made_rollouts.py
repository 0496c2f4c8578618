"""Rollouts that nobody generated: plain numbers, deterministic in (iteration, group, member).

So a resumed run sees what an uninterrupted one would. Token ids fit the demo's tokenizer.
"""

import random
from typing import NamedTuple

BEGIN, END = 1, 2


class Sample(NamedTuple):
    """Token ids of one rollout, and the reward that it is given."""

    prompt: list[int]
    response: list[int]
    reward: float

    @property
    def tokens(self) -> list[int]:
        """Prompt and response."""
        return self.prompt + self.response


def sample(iteration: int, group: int, member: int) -> Sample:
    """The prompt of a group, a response of its own, a reward that differs within the group."""
    draw = random.Random(f"{iteration} {group}")
    prompt = [BEGIN, *(draw.randrange(4, 1000) for _ in range(draw.randrange(4, 9)))]
    draw = random.Random(f"{iteration} {group} {member}")
    response = [*(draw.randrange(4, 1000) for _ in range(draw.randrange(3, 20))), END]
    return Sample(prompt, response, float(member % 2))
