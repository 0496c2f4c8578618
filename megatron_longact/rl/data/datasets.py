"""JSONL data sets: one prompt a line, with what judges its responses.

    {"prompt": "2 + 2 =", "reference": "4", "reward": "numeric", "anything": "else"}
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "reference": 4, "reward": "my_rewards:checked"}

A file is read through once, when its `Dataset` is made, and every line is checked as far as it can be without a model.
Kept in memory are the places and lengths of the lines alone: contexts of 128k tokens times thousands of lines would be
gigabytes in each rank. A line that is asked for is read and tokenized again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_longact.rl.data.rewards import REWARDS, find_reward
from megatron_longact.tasks.chat import Messages, PromptEncoder
from megatron_longact.tasks.json_lines import check_text, parse_json

FIELDS = ("prompt", "reference", "reward")


@dataclass(frozen=True)
class Example:
    """One line of a data set, ready for the model.

    text: the prompt as text, a chat template applied; tokens: the same as tokens; reward: its name; metadata: all
    other fields; source: `file:line`.
    """

    text: str
    tokens: tuple[int, ...]
    reference: Any
    reward: str
    metadata: dict[str, Any]
    source: str


@dataclass(frozen=True)
class _Place:
    """Where a line stands, its prompt's tokens, and its `length` field if that is a positive integer."""

    offset: int
    line: int
    tokens: int
    length: int | None


class Dataset:
    """The examples of a JSONL file, by index.

    max_prompt_length: tokens of a prompt at most; drop_overlong: leave longer ones out instead of refusing the file;
    default_reward: of lines that name none. `dropped` counts what was left out. Blank lines are skipped. Raises
    ValueError that names the file and the line: not JSON, a field that is missing or of the wrong type, a reward that
    does not exist or whose reference is not what it needs, an empty prompt, a prompt that is too long.
    """

    def __init__(
        self,
        path: str | Path,
        encoder: PromptEncoder,
        *,
        max_prompt_length: int,
        drop_overlong: bool = False,
        default_reward: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._encoder = encoder
        self._max_prompt_length = max_prompt_length
        self._drop_overlong = drop_overlong
        self._default_reward = default_reward
        self._stamp = self._current_stamp()
        self._places = list(self._checked_places())
        if not self._places:
            dropped = f" (all {self.dropped} prompts are too long)" if self.dropped else ""
            raise ValueError(f"{self.path}: the data set has no example{dropped}")
        self.lengths = np.array([place.tokens for place in self._places])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """Read an example; RuntimeError if the file was changed since it was checked."""
        place = self._places[index]
        if self._current_stamp() != self._stamp:
            raise RuntimeError(f"{self.path} was changed while it is in use")
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return self._example(file.readline(), place.line)

    def source(self, index: int) -> str:
        """`file:line` of an example."""
        return f"{self.path}:{self._places[index].line}"

    def stated_length(self, index: int) -> int | None:
        """The example's own `length` field; None unless that is a positive integer."""
        return self._places[index].length

    @property
    def summary(self) -> str:
        """One line: how many prompts, how long, how many were left out."""
        dropped = f"; {self.dropped} dropped, longer than {self._max_prompt_length}" if self.dropped else ""
        return f"{self.path}: {len(self)} prompts of {self.lengths.min()} to {self.lengths.max()} tokens{dropped}"

    def _checked_places(self) -> Iterator[_Place]:
        offset = 0
        with self.path.open("rb") as file:
            for line, content in enumerate(file, start=1):
                if content.strip():
                    place = self._check(content, offset=offset, line=line)
                    if place is not None:
                        yield place
                offset += len(content)

    def _check(self, content: bytes, *, offset: int, line: int) -> _Place | None:
        """The line's place; None if it is dropped."""
        example = self._example(content, line)
        if len(example.tokens) > self._max_prompt_length:
            if not self._drop_overlong:
                raise ValueError(
                    f"{example.source}: the prompt has {len(example.tokens)} tokens, and at most "
                    f"{self._max_prompt_length} fit (--seq-length less --max-response-length); shorten it, or leave "
                    "such prompts out with --drop-overlong-prompts"
                )
            self.dropped += 1
            return None
        stated = example.metadata.get("length")
        is_length = isinstance(stated, int) and not isinstance(stated, bool) and stated > 0
        return _Place(offset, line, len(example.tokens), stated if is_length else None)

    def _example(self, content: bytes, line: int) -> Example:
        source = f"{self.path}:{line}"
        try:
            fields = _fields(content, default_reward=self._default_reward)
            encoded = self._encoder.encode(fields["prompt"])
            if not encoded.tokens:
                raise ValueError("the prompt has no tokens")
            reward, reference = fields["reward"], fields["reference"]
            function = find_reward(reward)
            if reward in REWARDS:  # a built-in one says at once if the reference is not what it needs
                function(encoded.text, "", reference)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        metadata = {name: value for name, value in fields.items() if name not in FIELDS}
        return Example(encoded.text, encoded.tokens, reference, reward, metadata, source)

    def _current_stamp(self) -> tuple[int, int]:
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such data set")
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns


def _fields(content: bytes, *, default_reward: str | None) -> dict[str, Any]:
    """The fields of a line, with types checked; ValueError says what is wrong with it."""
    try:
        text = content.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    fields = parse_json(text)
    if not isinstance(fields, dict):
        raise ValueError(f"a line must be a JSON object with {', '.join(FIELDS)}, not {_kind(fields)}")
    if default_reward is not None:
        fields.setdefault("reward", default_reward)
    for name in FIELDS:
        if name not in fields:
            hint = " (--default-reward names one for lines without)" if name == "reward" else ""
            raise ValueError(f"the field {name!r} is missing{hint}")
    if not isinstance(fields["reward"], str):
        raise ValueError(f"'reward' must be a string, not {_kind(fields['reward'])}")
    _check_prompt(fields["prompt"])
    return fields


def _check_prompt(prompt: str | Messages | Any) -> None:
    if not isinstance(prompt, str | list):
        raise ValueError(f"'prompt' must be a string or a list of messages, not {_kind(prompt)}")
    if not prompt or (isinstance(prompt, str) and not check_text(prompt).strip()):
        raise ValueError("the prompt is empty")
    if isinstance(prompt, list):
        for i, message in enumerate(prompt):
            if not isinstance(message, dict):
                raise ValueError(
                    f"message {i} of the prompt must be an object with role and content, not {_kind(message)}"
                )
            for name in ("role", "content"):
                if not isinstance(message.get(name), str):
                    raise ValueError(f"message {i} of the prompt must have a string as its {name!r}")
                check_text(message[name])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
