"""Needle tasks for RL over long contexts: RULER's single, multi-key, multi-value and multi-query.

A prompt is: an instruction, a haystack of prose with needle sentences in it, a question and the
beginning of the answer. The structure and the needle sentence are RULER's (arXiv 2404.06654,
`scripts/data/synthetic/niah.py`); the other wording is ours. What differs from RULER on purpose:

- lengths are exact: every prompt has precisely the drawn number of tokens, because the static
  inference engine prefills prompts of one length together and others token by token;
- keys are single words of a short list, values have two digits instead of seven, and fewer values are
  asked for, so that a model of less than a million parameters can learn the tasks (`NeedleTask` takes
  RULER's own numbers too).

The haystack is the prose of CPython's own documentation, `pydoc_data.topics`. Its text differs a
little between CPython releases (3.12 and 3.13 share most of it), so samples are reproducible for
one CPython minor version, not across them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics as PYDOC_TOPICS
from typing import Literal, Protocol

from megatron_longact.tasks.pieces import PieceEncoder

Split = Literal["train", "heldout"]

HELDOUT_TOPICS = ("debugger", "execmodel", "formatstrings", "import", "strings", "typesmapping")

# fmt: off
KEYS = (
    "amber", "ancient", "bold", "brave", "bright", "calm", "clever", "crisp", "curious", "distant", "eager",
    "early", "fancy", "gentle", "golden", "happy", "hidden", "humble", "icy", "jolly", "keen", "lively",
    "lucky", "mellow", "noble", "patient", "proud", "quiet", "rapid", "silver", "steady", "tiny",
    "anchor", "badger", "beacon", "canyon", "cedar", "comet", "copper", "desert", "falcon", "feather",
    "forest", "garden", "glacier", "harbor", "island", "jacket", "kettle", "lantern", "maple", "meadow",
    "mirror", "ocean", "orchid", "pebble", "pepper", "raven", "river", "saddle", "thunder", "tunnel",
    "violin", "walnut",
)
# fmt: on

NEEDLE = "One of the special magic numbers for {key} is: {value}."
_INSTRUCTION = "Some special magic numbers are hidden in the text below. Remember them."
_QUESTIONS = {
    False: "Which special magic number does the text give for {keys}?",
    True: "Which special magic numbers does the text give for {keys}?",
}
_ANSWER_PREFIXES = {
    False: "The special magic number for {keys} is:",
    True: "The special magic numbers are these. For {first} is:",
}
TEMPLATES = (_INSTRUCTION, NEEDLE, *_QUESTIONS.values(), *_ANSWER_PREFIXES.values())


class Tokenizer(Protocol):
    """The part of a Megatron tokenizer that the tasks need."""

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer puts around it, if any."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


@dataclass(frozen=True)
class NeedleTask:
    """What one needle task hides and asks for (RULER's num_needle_k, _v and _q).

    num_keys: keys hidden in the haystack, the asked ones included.
    num_values: values hidden for each key.
    num_queries: keys asked for; all values of each are the references.
    """

    name: str
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_keys:
            raise ValueError(
                f"{self.name}: num_queries is {self.num_queries}; it must lie between 1 and "
                f"num_keys, which is {self.num_keys}"
            )
        if self.num_values < 1:
            raise ValueError(f"{self.name}: num_values is {self.num_values}; it must be at least 1")


NEEDLE_TASKS: dict[str, NeedleTask] = {
    task.name: task
    for task in (
        NeedleTask("single"),
        NeedleTask("multikey", num_keys=4),
        NeedleTask("multivalue", num_values=2),
        NeedleTask("multiquery", num_keys=2, num_queries=2),
    )
}


@dataclass(frozen=True)
class NeedleSample:
    """One prompt and what a right answer holds.

    prompt_ids: the prompt's tokens; `length` of them, exactly, with the `<s>` of a tokenizer that begins texts with it.
    prompt: the text that these ids stand for.
    references: the values asked for, in the order of the question and then of the text.
    depths: where each needle begins, as a share of the haystack, in the order of the text.
    """

    prompt_ids: tuple[int, ...]
    prompt: str
    references: tuple[str, ...]
    task: str
    length: int
    depths: tuple[float, ...]

    @property
    def answer(self) -> str:
        """The response that supervised training teaches; it goes on directly after the prompt."""
        return " " + ", ".join(self.references) + "."


@dataclass(frozen=True)
class _Needle:
    key: str
    value: str


class NeedleGenerator:
    """Samples of the needle tasks, a pure function of (seed, split, step, index).

    tokenizer: turns text into ids and back; a Megatron tokenizer as it is.
    tasks: names of `NEEDLE_TASKS` or tasks of one's own, drawn with equal chance.
    lengths: prompt lengths in tokens, drawn with equal chance.
    split: "train" or "heldout": other texts, and another stream of random numbers.
    same_length: all samples of a step have the one length drawn for the step.

    Raises ValueError for an unknown task, no tasks or no lengths; `sample` raises it for a length
    that cannot hold the task.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tasks: Sequence[str | NeedleTask] = tuple(NEEDLE_TASKS),
        lengths: Sequence[int],
        split: Split = "train",
        seed: int,
        same_length: bool = False,
    ) -> None:
        if not lengths or not tasks:
            raise ValueError(f"give at least one task and one length, not {tasks} and {lengths}")
        self.tokenizer = tokenizer
        self.pieces = PieceEncoder(tokenizer.tokenize)
        self.tasks = tuple(_as_task(task) for task in tasks)
        self.lengths = tuple(lengths)
        self.split = split
        self.seed = seed
        self.same_length = same_length
        self._sentences = [self._tokens(text) for text in sentences_of(split)]

    def sample(
        self,
        step: int,
        index: int,
        *,
        task: str | NeedleTask | None = None,
        length: int | None = None,
    ) -> NeedleSample:
        """The index-th sample of a step; `task` and `length` replace the drawn ones."""
        rng = self._rng(step, index)
        drawn_task = rng.choice(self.tasks)
        drawn_length = (self._rng(step, "length") if self.same_length else rng).choice(self.lengths)
        return self._build(
            drawn_task if task is None else _as_task(task),
            drawn_length if length is None else length,
            rng=rng,
        )

    def _rng(self, step: int, index: int | str) -> random.Random:
        return random.Random(f"{self.seed}/{self.split}/{step}/{index}")

    def _build(self, task: NeedleTask, length: int, *, rng: random.Random) -> NeedleSample:
        needles = _draw_needles(task, rng=rng)
        queries = rng.sample(list(dict.fromkeys(n.key for n in needles)), task.num_queries)
        references = tuple(n.value for key in queries for n in needles if n.key == key)
        plural = len(references) > 1
        question = [_QUESTIONS[plural], _ANSWER_PREFIXES[plural]]
        head = self.pieces.prompt(_INSTRUCTION)
        tail = [i for t in question for i in self._tokens(t.format(keys=_and_list(queries), first=queries[0]))]
        needle_ids = [self._tokens(NEEDLE.format(key=n.key, value=n.value)) for n in needles]
        room = length - len(head) - len(tail) - sum(map(len, needle_ids))
        if room < 0:
            raise ValueError(
                f"task {task.name!r} needs {length - room} tokens without any haystack; "
                f"a length of {length} cannot hold it"
            )
        haystack, depths = _hide(self._cut_haystack(room, rng=rng), needle_ids, rng=rng)
        ids = head + haystack + tail
        assert len(ids) == length
        return NeedleSample(
            prompt_ids=tuple(ids),
            prompt=self.tokenizer.detokenize(ids),
            references=references,
            task=task.name,
            length=length,
            depths=depths,
        )

    def _tokens(self, text: str) -> list[int]:
        return self.pieces.piece(" " + text)

    def _cut_haystack(self, room: int, *, rng: random.Random) -> list[list[int]]:
        """Consecutive sentences from a drawn place on, the last one cut: `room` tokens in all."""
        start = rng.randrange(len(self._sentences))
        chosen: list[list[int]] = []
        while room > 0:
            sentence = self._sentences[start % len(self._sentences)][:room]
            chosen.append(sentence)
            room -= len(sentence)
            start += 1
        return chosen


def reward(response: str, references: Sequence[str]) -> float:
    """Numbers that are right over numbers that are right, wrong or missing, in [0, 1]; 1 for an exact match.

    RULER's own score, the share of references present, would reward a policy for listing every number.
    """
    given = re.findall(r"\d+", response)
    right = len(set(given) & set(references))
    return right / (len(references) + len(given) - right)


def exact_match(response: str, references: Sequence[str]) -> bool:
    """Whether the response's numbers are the references, each once, in any order, and no others."""
    return sorted(re.findall(r"\d+", response)) == sorted(references)


@cache
def sentences_of(split: Split) -> tuple[str, ...]:
    """The prose of a split, sentence by sentence, in the order of the (sorted) topics.

    Topics quote one another, so a sentence that occurs in a held-out topic is left out of the
    training text.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    heldout = tuple(_prose({name: PYDOC_TOPICS[name] for name in HELDOUT_TOPICS}))
    if split == "heldout":
        return heldout
    others = {k: v for k, v in PYDOC_TOPICS.items() if k not in HELDOUT_TOPICS}
    return tuple(s for s in _prose(others) if s not in set(heldout))


def _as_task(task: str | NeedleTask) -> NeedleTask:
    if isinstance(task, NeedleTask):
        return task
    if task not in NEEDLE_TASKS:
        raise ValueError(f"unknown needle task {task!r}; known: {', '.join(NEEDLE_TASKS)}")
    return NEEDLE_TASKS[task]


def _draw_needles(task: NeedleTask, *, rng: random.Random) -> list[_Needle]:
    """Needles in the order of the text: distinct keys, distinct values."""
    drawn_keys = rng.sample(KEYS, task.num_keys)
    values = rng.sample(range(10, 100), task.num_keys * task.num_values)
    owners = [key for key in drawn_keys for _ in range(task.num_values)]
    needles = [_Needle(key, str(value)) for key, value in zip(owners, values, strict=True)]
    rng.shuffle(needles)
    return needles


def _hide(
    sentences: list[list[int]], needles: list[list[int]], *, rng: random.Random
) -> tuple[list[int], tuple[float, ...]]:
    """Put needles between sentences, each at a drawn depth; ids and the depths that came out."""
    bounds = [0]
    for sentence in sentences:
        bounds.append(bounds[-1] + len(sentence))
    wanted = sorted(rng.random() for _ in needles)
    places = [_nearest(bounds, depth * bounds[-1]) for depth in wanted]
    flat = [i for sentence in sentences for i in sentence]
    ids: list[int] = []
    begins: list[int] = []
    done = 0
    for place, needle in zip(places, needles, strict=True):
        ids += flat[done:place]
        begins.append(len(ids))
        ids += needle
        done = place
    ids += flat[done:]
    return ids, tuple(begin / len(ids) for begin in begins)


def _nearest(bounds: Sequence[int], place: float) -> int:
    return min(bounds, key=lambda bound: abs(bound - place))


def _and_list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _prose(topics: Mapping[str, str]) -> list[str]:
    """Sentences of the topics without headings, grammars, code and repetitions."""
    paragraphs = [p for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name])]
    text = [" ".join(p.split()) for p in paragraphs if _is_prose(p)]
    sentences = [s for p in text for s in re.split(r"(?<=[.!?]) (?=[A-Z\"“*])", p)]
    return list(dict.fromkeys(s for s in sentences if len(s.split()) >= 5))


def _is_prose(paragraph: str) -> bool:
    stripped = paragraph.strip()
    letters = sum(c.isalpha() or c.isspace() for c in stripped)
    return (
        stripped.endswith((".", "!", "?"))
        and not re.search(r">>>|::=|^\s*[=*~^+|-]{4,}", paragraph, re.MULTILINE)
        and letters >= 0.85 * len(stripped)
    )
