"""Flags of every program that makes prompts for a model: RULER's files, and the template around a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_longact.flags import Flag
from megatron_longact.tasks.pieces import TASK_TEMPLATE


@dataclass(frozen=True, kw_only=True)
class PromptFlags:
    """What is around a prompt and what RULER's are made from. Raises `ValueError` for a template without its place."""

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

    @property
    def ruler_files(self) -> dict[str, Any]:
        """By the names of `ruler.generate`'s arguments."""
        return {"essays": self.essays, "words": self.words, "squad": self.squad, "hotpotqa": self.hotpotqa}
