"""What a model is observed on: RULER's tasks, made on the spot, or the user's own text, as tokens."""

from __future__ import annotations

import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from megatron_longact.flags import Flag, ascending, config_from_flags, each_once
from megatron_longact.tasks import ruler
from megatron_longact.tasks.chat import ChatTemplate
from megatron_longact.tasks.json_lines import check_text, parse_json
from megatron_longact.tasks.pieces import PieceEncoder
from megatron_longact.tasks.prompt_flags import Framing, PromptFlags

DEFAULT_TASKS = ("niah_single_2", "niah_multikey_2", "vt", "cwe", "fwe", "qa_1")
DEFAULT_LENGTHS = (2048, 4096)
_TEXT_FIELDS = ("text", "prompt", "input")


class Reader(Protocol):
    """What reads prompts: a tokenizer, and how many tokens the model takes."""

    positions: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def chat_template(self) -> ChatTemplate | None:
        """The tokenizer's, if it has one."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptOptions(PromptFlags):
    """Which prompts; `lengths` are tokens of a prompt. None as a length: as long as the file's prompts are.

    Raises `ValueError` for unknown tasks and for numbers below 1.
    """

    tasks: Annotated[tuple[str, ...], Flag(metavar="TASK", parse=each_once)] = DEFAULT_TASKS
    """RULER's tasks."""
    lengths: Annotated[tuple[int | None, ...], Flag(metavar="TOKENS", parse=ascending)] = DEFAULT_LENGTHS
    """Prompt lengths; with --prompts as long as they are."""
    num_samples: int = 4
    """Prompts of each task and length."""
    seed: Annotated[int, Flag("--sample-seed")] = 42
    """Seed of the prompts."""
    file: Annotated[Path | None, Flag("--prompts")] = None
    """Instead of RULER: a text file, or a .jsonl file with text or tokens."""

    @classmethod
    def from_args(cls, args: Namespace) -> PromptOptions:
        """What the flags ask for; `ValueError` for what makes no sense."""
        settled: dict[str, Any] = {}
        if args.prompts is not None:
            if args.tasks is not DEFAULT_TASKS:
                raise ValueError("--tasks are RULER's; they do not go with --prompts")
            settled = {"tasks": (args.prompts.stem,)}
            settled |= {"lengths": (None,)} if args.lengths is DEFAULT_LENGTHS else {}
        options: PromptOptions = config_from_flags(cls, args, **settled)
        return options

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in ruler.TASKS]
        if self.file is None and unknown:
            raise ValueError(f"--tasks has {unknown[0]!r}; RULER's tasks are {', '.join(ruler.TASKS)}")
        for name, value in (("--num-samples", self.num_samples), *(("--lengths", length) for length in self.lengths)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def framing_for(self, reader: Reader) -> Framing:
        """What stands around a prompt; raises `ValueError` as `framing` does."""
        own = "" if self.file is None else "the text of --prompts is taken as it is"
        return self.framing(reader.encode, reader.chat_template, alone=own)

    def prompts(self, reader: Reader, *, task: str, length: int | None, seed: int | None = None) -> list[list[int]]:
        """The prompts of one task, one length and one seed (None: that of the options).

        Raises `ValueError` for a length that the task or the model cannot hold, and for a file without such prompts.
        """
        positions, framing = reader.positions, self.framing_for(reader)
        if length is not None and length > positions:
            raise ValueError(f"--lengths asks for {length} tokens, but the model has {positions} positions")
        seed = self.seed if seed is None else seed
        pieces = PieceEncoder(framing.encode)
        if self.file is not None:
            return _of_file(self.file, length, pieces=pieces, count=self.num_samples, seed=seed, positions=positions)
        assert length is not None
        samples = ruler.generate(
            task,
            num_samples=self.num_samples,
            max_seq_length=length,
            tokenizer=pieces,
            seed=seed,
            tokens_to_generate=0,
            model_template=framing.model_template,
            **self.ruler_files,
        )
        return [pieces.prompt(sample["input"] + sample["answer_prefix"]) for sample in samples]


def _of_file(
    path: Path, length: int | None, *, pieces: PieceEncoder, count: int, seed: int, positions: int
) -> list[list[int]]:
    """`count` prompts drawn by the seed: rows of a JSON-lines file, cut to the length; or windows of a text."""
    rng = random.Random(seed)
    if path.suffix == ".jsonl":
        rows = [_tokens(row, number, path, pieces) for number, row in _rows(path)]
    else:
        rows = _windows(_read(path), length, pieces=pieces, count=count, rng=rng)
    fitting = [row[:length] if length else row for row in rows if len(row) >= (length or 1)]
    if not fitting:
        longest = max(map(len, rows), default=0)
        raise ValueError(f"{path} has no prompt of {length or 1} tokens: its longest has {longest}")
    if length is None and (longest := max(map(len, fitting))) > positions:
        raise ValueError(f"{path} has a prompt of {longest} tokens, the model {positions} positions; give --lengths")
    return rng.sample(fitting, min(count, len(fitting)))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --prompts {path}: {error}") from error


def _rows(path: Path) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(_read(path).split("\n"), 1):  # splitlines() would also split at U+2028 in a string
        if line.strip():
            try:
                row = parse_json(line)
                for value in row.values() if isinstance(row, dict) else ():
                    check_text(value if isinstance(value, str) else "")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            rows.append((number, row))
    return rows


def _tokens(row: Any, number: int, path: Path, pieces: PieceEncoder) -> list[int]:
    """A row's "tokens", or its "text", "prompt" or "input" (with RULER's "answer_prefix" behind it)."""
    if isinstance(row, dict):
        if isinstance(row.get("tokens"), list):
            if not all(type(token) is int and token >= 0 for token in row["tokens"]):
                raise ValueError(f"{path}, line {number}: 'tokens' must be token ids, whole numbers from 0 on")
            return list(row["tokens"])
        for name in _TEXT_FIELDS:
            if isinstance(row.get(name), str):
                prefix = row.get("answer_prefix")
                return pieces.prompt(row[name] + (prefix if isinstance(prefix, str) else ""))
    raise ValueError(f"{path}, line {number} has neither tokens nor a text in {', '.join(_TEXT_FIELDS)}")


def _windows(text: str, length: int | None, *, pieces: PieceEncoder, count: int, rng: random.Random) -> list[list[int]]:
    """Windows of a text, one behind the other, each with the tokenizer's prefix; the whole text without a length."""
    tokens, prefix = pieces.piece(text), pieces.prefix
    if length is None or len(prefix) + len(tokens) <= length:
        return [pieces.begun(tokens)]
    own = max(length - len(prefix), 1)
    starts = range(0, len(tokens) - own + 1, own)
    return [prefix + tokens[start : start + own] for start in rng.sample(starts, min(count, len(starts)))]
