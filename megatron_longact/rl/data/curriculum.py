"""The longest prompt that training may see, as a schedule over rollout steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

USAGE = "STEP:LENGTH pairs from step 0 on, such as 0:4096 100:8192"


@dataclass(frozen=True)
class Curriculum:
    """From each step on, prompts of at most so many tokens; without stages: of any length.

    stages: (step, length) pairs. Raises ValueError unless the steps begin at 0 and increase and the lengths are
    positive.
    """

    stages: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.stages]
        if steps and (steps[0] != 0 or any(b <= a for a, b in pairwise(steps))):
            raise ValueError(f"--curriculum has the steps {steps}; they must begin at 0 and increase ({USAGE})")
        for step, length in self.stages:
            if length < 1:
                raise ValueError(
                    f"--curriculum: from step {step} on the longest prompt is {length}; it must be positive"
                )

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Curriculum:
        """From `STEP:LENGTH` strings; ValueError for others."""
        stages = []
        for pair in pairs:
            step, colon, length = pair.partition(":")
            if not (colon and step.isdecimal() and length.isdecimal()):
                raise ValueError(f"--curriculum {pair}: give {USAGE}")
            stages.append((int(step), int(length)))
        return cls(tuple(stages))

    def limit(self, step: int) -> int | None:
        """The longest prompt of a rollout step; None: any."""
        reached = [length for begin, length in self.stages if begin <= step]
        return reached[-1] if reached else None

    @property
    def limits(self) -> list[int | None]:
        """The limits of all stages, in their order; [None] without stages."""
        return [length for _, length in self.stages] or [None]
