"""RULER's tasks to train on: its own generator, the model's chat template, RULER's own score as the reward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from megatron_longact.rl.data.curriculum import Curriculum
from megatron_longact.rl.data.environment import Score, Task, Turn, allowed_lengths
from megatron_longact.tasks import ruler
from megatron_longact.tasks.chat import EncodedPrompt, PromptEncoder
from megatron_longact.tasks.needle import Split
from megatron_longact.tasks.ruler.generation import Samples
from megatron_longact.tasks.ruler.haystack import prose_of

_TASKS_A_STEP = 1 << 20
"""More tasks than any step asks for: each has a sample of its own."""
_SPLITS: tuple[Split, ...] = ("train", "heldout")


class RulerEnvironment:
    """RULER (`megatron_longact.tasks.ruler`) as an environment.

    names: tasks, drawn with equal chance; none: all. lengths: of a prompt and `response_length` together, as RULER
    counts, drawn with equal chance out of those that the curriculum allows; none: the held-out ones. Training and
    held-out tasks have different seeds, different prose as haystack, and different questions (even and odd ones), about
    the same documents. The prompt is the user's turn where the tokenizer has a chat template, and the assistant's has
    begun with RULER's beginning of the answer. Raises ValueError, when it is made, for an unknown task, for a length
    that cannot hold one, and for a curriculum that allows no length.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        *,
        names: Sequence[str],
        lengths: Sequence[int],
        heldout_lengths: Sequence[int],
        response_length: int,
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self._names = tuple(names) or tuple(ruler.TASKS)
        self._encoder, self._response_length, self._seed = encoder, response_length, seed
        self._curriculum = curriculum or Curriculum()
        self._heldout_lengths = tuple(heldout_lengths)
        drawn = lengths or heldout_lengths
        self._lengths = {limit: allowed_lengths(drawn, limit) for limit in self._curriculum.limits}
        self._samples = cache(self._new_samples)
        for length in {*drawn, *heldout_lengths}:
            for name in self._names:
                self._samples(name, length, "train")[0]

    def training_tasks(self, step: int, *, count: int, first: int = 0) -> list[Task]:
        """See `Environment`."""
        return [self._task(step, index) for index in range(first, first + count)]

    def task(self, turn: Turn) -> Task:
        """See `TaskSource`."""
        return self._task(turn.step, turn.index)

    @property
    def heldout_lengths(self) -> tuple[int, ...]:
        """See `Environment`."""
        return self._heldout_lengths

    @property
    def longest_prompt(self) -> int:
        """See `Environment`."""
        drawn = [length for lengths in self._lengths.values() for length in lengths]
        return max([*drawn, *self._heldout_lengths]) - self._response_length

    def heldout_tasks(self, length: int, *, count: int) -> list[Task]:
        """See `Environment`; tasks take turns, so each has its share at every length, until questions are used up."""
        names, made = self._names, []
        for number in range(count):
            index, which = divmod(number, len(names))
            if index < (self._questions(names[which], length, "heldout") or index + 1):
                made.append(self._made(names[which], length, "heldout", index))
        return made

    def score(self, task: Task, response: str) -> Score:
        """Reward: RULER's score of the response, a share of 1; right: the whole of it."""
        percent = ruler.score(task.name, [response], [task.reference])
        return Score(reward=percent / 100, correct=percent == 100)

    def _task(self, step: int, index: int) -> Task:
        rng = random.Random(f"{self._seed}/ruler/{step}/{index}")
        name, length = rng.choice(self._names), rng.choice(self._lengths[self._curriculum.limit(step)])
        questions = self._questions(name, length, "train")
        return self._made(
            name, length, "train", rng.randrange(questions) if questions else step * _TASKS_A_STEP + index
        )

    def _questions(self, name: str, length: int, split: Split) -> int | None:
        """How many questions a split of a task has; None: no end of them."""
        count = self._samples(name, length, split).count
        return None if count is None else (count + 1 - _SPLITS.index(split)) // len(_SPLITS)

    def _made(self, name: str, length: int, split: Split, index: int) -> Task:
        samples = self._samples(name, length, split)
        place = index if samples.count is None else len(_SPLITS) * index + _SPLITS.index(split)
        sample = samples[place]
        prompt = self._encoded(sample["input"], sample["answer_prefix"])
        answers = tuple(sample["outputs"])
        return Task(prompt.tokens, name, reference=answers, answer=answers)

    def _encoded(self, text: str, begun: str) -> EncodedPrompt:
        if not self._encoder.has_template:
            return self._encoder.encode(text + begun)
        return self._encoder.encode([{"role": "user", "content": text}], begun=begun)

    def _new_samples(self, name: str, length: int, split: Split) -> Samples:
        return Samples(
            name,
            max_seq_length=length,
            count_tokens=lambda text, begun: len(self._encoded(text, begun).tokens),
            seed=len(_SPLITS) * self._seed + _SPLITS.index(split),
            tokens_to_generate=self._response_length,
            essays=prose_of(split),
        )
