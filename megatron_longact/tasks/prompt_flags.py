"""Flags of every program that makes prompts for a model: RULER's files, and the template around a prompt."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from megatron_longact.flags import Flag
from megatron_longact.tasks.chat import ChatTemplate, read_chat_template
from megatron_longact.tasks.pieces import TASK_TEMPLATE, PieceEncoder

Encode = Callable[[str], list[int]]
_TURN = "What is two and two?"


@dataclass(frozen=True)
class Framing:
    """How a prompt is put to the model: the text around it, what makes tokens of the whole, and a line that says so."""

    model_template: str
    encode: Encode
    remark: str


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What is around a prompt and what RULER's are made from. Raises `ValueError` for a template without its place."""

    apply_chat_template: Annotated[bool | None, Flag(also=("--apply_chat_template",))] = None
    """A prompt is the user's turn of the tokenizer's chat template. Default: where it has one and there is no
    --model-template."""
    model_template: Annotated[str, Flag(parse=lambda text: text.replace("\\n", "\n"))] = TASK_TEMPLATE
    """Text that the model wants around a prompt, with {task_template} in it; \\n is a newline. Default: none."""
    essays: Path | None = None
    """RULER: PaulGrahamEssays.json, or a text file. Default: built-in prose."""
    words: Path | None = None
    """RULER: folder with wonderwords' lists. Default: the package's own, if it is installed."""
    squad: Path | None = None
    """RULER, qa_1: SQuAD's dev-v2.0.json. Default: built-in questions."""
    hotpotqa: Path | None = None
    """RULER, qa_2: hotpot_dev_distractor_v1.json. Default: built-in questions."""

    def __post_init__(self) -> None:
        if self.model_template.count(TASK_TEMPLATE) != 1:
            raise ValueError(f"--model-template must have {TASK_TEMPLATE} in it once: {self.model_template!r}")
        if self.apply_chat_template and self.model_template != TASK_TEMPLATE:
            raise ValueError("--apply-chat-template and --model-template both say what is around a prompt: give one")

    def framing(self, encode: Encode, chat: Callable[[], ChatTemplate | None], *, alone: str = "") -> Framing:
        """As the flags say, and where they say nothing as the tokenizer has it.

        encode: the tokenizer's own; chat: finds its chat template; alone: why nothing can stand around these prompts.
        Raises ValueError for a flag that cannot be followed.
        """
        given = "--apply-chat-template" * bool(self.apply_chat_template)
        given = given or "--model-template" * (self.model_template != TASK_TEMPLATE)
        if alone:
            if given:
                raise ValueError(f"{given} does not go with these prompts: {alone}")
            return Framing(TASK_TEMPLATE, encode, "")
        if given == "--model-template":
            return Framing(self.model_template, encode, "around each prompt stands --model-template")
        found = None if self.apply_chat_template is False else chat()
        if found is not None:
            return _turns(found, encode)
        if given:
            raise ValueError(f"{given}: the tokenizer has no chat template; leave it out, or give --model-template")
        why = "--no-apply-chat-template" if self.apply_chat_template is False else "the tokenizer has no chat template"
        return Framing(TASK_TEMPLATE, encode, f"nothing stands around a prompt: {why}")

    def framed(self, framing: Framing) -> Self:
        """The flags with what they come to."""
        return replace(self, model_template=framing.model_template, apply_chat_template=None)

    @property
    def ruler_files(self) -> dict[str, Any]:
        """By the names of `ruler.generate`'s arguments."""
        return {"essays": self.essays, "words": self.words, "squad": self.squad, "hotpotqa": self.hotpotqa}


def framing_of_megatron(flags: PromptFlags, tokenizer: Any, args: Namespace, *, alone: str = "") -> Framing:
    """`PromptFlags.framing` with Megatron's tokenizer and its `--chat-template`."""
    given = read_chat_template(args.chat_template)
    return flags.framing(tokenizer.tokenize, lambda: ChatTemplate.of(tokenizer, given=given), alone=alone)


def _turns(chat: ChatTemplate, encode: Encode) -> Framing:
    around, piece = chat.around(), PieceEncoder(encode).piece  # the template writes what begins a text, if anything
    tokens = chat.apply([{"role": "user", "content": _TURN}], tokenize=True)
    if list(tokens) != piece(around.replace(TASK_TEMPLATE, _TURN)):
        raise ValueError(
            "the chat template changes what stands in a user's turn, or its tokens are not those of its text: "
            "--no-apply-chat-template goes without it, --model-template says what is to stand around a prompt"
        )
    return Framing(around, piece, "each prompt is a user's turn of the chat template (--no-apply-chat-template: alone)")
