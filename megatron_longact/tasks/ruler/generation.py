"""`generate`: samples of one task for one tokenizer and one length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any, Protocol

from megatron_longact.tasks.pieces import TASK_TEMPLATE
from megatron_longact.tasks.ruler.haystack import Haystack, haystack
from megatron_longact.tasks.ruler.makers import PROBE, Draft, Maker, rng_of
from megatron_longact.tasks.ruler.needles import NeedleMaker
from megatron_longact.tasks.ruler.questions import QuestionMaker, question_set
from megatron_longact.tasks.ruler.tasks import RulerTask, task_named
from megatron_longact.tasks.ruler.tracking import TrackingMaker
from megatron_longact.tasks.ruler.word_counts import CodedWordsMaker, CommonWordsMaker
from megatron_longact.tasks.ruler.words import word_list

TOKENS_A_CODED_WORD, LEAST_CODED_WORDS = 50, 4
TOKENS_OF_TRACKING_EXAMPLE = 500


class TextEncoder(Protocol):
    """All that is asked of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text; only their number is looked at."""
        ...


def generate(
    task: str,
    *,
    num_samples: int,
    max_seq_length: int,
    tokenizer: TextEncoder,
    seed: int = 42,
    tokens_to_generate: int | None = None,
    model_template: str = TASK_TEMPLATE,
    model_template_tokens: int = 0,
    essays: str | Path | None = None,
    words: str | Path | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Samples of a RULER task, each with as much haystack as `max_seq_length` tokens hold.

    A sample has the fields of the official JSON lines:

    - `index`: 0, 1, 2 and so on. The official niah.py overwrites it with the place of the answer in the text.
    - `input`: the prompt without the beginning of the answer, which is `answer_prefix`.
    - `outputs`: the right answers.
    - `length`: tokens of input and prefix together and the tokens to generate; at most `max_seq_length`.
    - `length_w_model_temp`: `length` and `model_template_tokens`.
    - `token_position_answer` (needle tasks): tokens before the first answer's first occurrence.
    - `others`: `task`, `max_seq_length`, and where haystack, words and questions come from.

    tokens_to_generate: another number than the task's own, which makes it another benchmark. model_template: what
    the model wants around a prompt, with {task_template} in it. model_template_tokens: room to leave for a template
    that is put around the prompt later. essays, squad, hotpotqa: the files that the official scripts download
    (`PaulGrahamEssays.json`, `dev-v2.0.json`, `hotpot_dev_distractor_v1.json`). words: a folder with wonderwords'
    lists. What is not given is built in, and `others` says so.

    A sample depends on task, seed, index, tokenizer and length, not on `num_samples`, not on global generators and
    not on the process. The official scripts draw everything from one global generator, so samples are not theirs
    one by one; what is asked, how it is hidden and how large the haystack is are. Haystacks are as large as fits
    in one sample that is tried first; a sample in which that is too much gets a little less. The official scripts
    have a least haystack of 5 to 25 sentences or 500 words and never end if it is too much.

    Raises ValueError for an unknown task, for files that are not what they should be, for more samples than there
    are questions, and for a length that cannot hold the samples: it says which one can.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    request = _request(
        task,
        tokenizer=tokenizer,
        seed=seed,
        tokens_to_generate=tokens_to_generate,
        model_template=model_template,
        model_template_tokens=model_template_tokens,
        files={"essays": essays, "words": words, "squad": squad, "hotpotqa": hotpotqa},
    )
    return request.samples(num_samples, max_seq_length)


class Samples:
    """The samples of one task at one length by index, each as `generate` makes it; any index, in any order.

    count_tokens: of an input and the beginning of its answer, with whatever is put around them; with what a response
    may have they are at most `max_seq_length`. essays: the prose of the haystacks; None: the built-in one. Raises
    ValueError for an unknown task; a sample that does not fit raises it as `generate` does.
    """

    def __init__(
        self,
        task: str,
        *,
        max_seq_length: int,
        count_tokens: Callable[[str, str], int],
        seed: int,
        tokens_to_generate: int,
        essays: Haystack | None = None,
    ) -> None:
        self._request = _Request(
            task=task_named(task),
            count_tokens=count_tokens,
            seed=seed,
            answer_tokens=tokens_to_generate,
            template=task_named(task).template,
            template_tokens=0,
            files=dict.fromkeys(("essays", "words", "squad", "hotpotqa")),
            prose=essays,
        )
        self._max_seq_length = max_seq_length
        self._maker = self._request.maker(max_seq_length)
        self._size = self._request.size(self._maker, max_seq_length)

    @property
    def count(self) -> int | None:
        """How many there are: one for each question; None: no end of them."""
        return len(self._maker.questions.questions) if isinstance(self._maker, QuestionMaker) else None

    def __getitem__(self, index: int) -> dict[str, Any]:
        draft = None if self._size is None else self._request.fit(self._maker, index, self._size, self._max_seq_length)
        if draft is None:
            raise ValueError(self._request.does_not_fit([index], self._max_seq_length))
        return self._request.sample(index, draft, self._max_seq_length)


def least_length(
    task: str,
    *,
    num_samples: int,
    max_seq_length: int,
    tokenizer: TextEncoder,
    seed: int = 42,
    tokens_to_generate: int | None = None,
    model_template: str = TASK_TEMPLATE,
    essays: str | Path | None = None,
    words: str | Path | None = None,
    squad: str | Path | None = None,
    hotpotqa: str | Path | None = None,
) -> int:
    """`max_seq_length` if `generate` can make the samples, or the least length at which it can; makes no haystack.

    Raises ValueError for more samples than there are questions, and as `generate` for files and template.
    """
    request = _request(
        task,
        tokenizer=tokenizer,
        seed=seed,
        tokens_to_generate=tokens_to_generate,
        model_template=model_template,
        model_template_tokens=0,
        files={"essays": essays, "words": words, "squad": squad, "hotpotqa": hotpotqa},
    )
    request.check_count(num_samples, max_seq_length)
    return request.least_length(range(num_samples), max_seq_length)


def _request(
    task: str,
    *,
    tokenizer: TextEncoder,
    seed: int,
    tokens_to_generate: int | None,
    model_template: str,
    model_template_tokens: int,
    files: Mapping[str, str | Path | None],
) -> _Request:
    if TASK_TEMPLATE not in model_template:
        raise ValueError(f"the model template {model_template!r} has no {TASK_TEMPLATE} in it")
    settings = task_named(task)
    return _Request(
        task=settings,
        count_tokens=lambda text, begun: len(tokenizer.encode(text + begun)),
        seed=seed,
        answer_tokens=settings.tokens_to_generate if tokens_to_generate is None else tokens_to_generate,
        template=model_template.replace(TASK_TEMPLATE, settings.template),
        template_tokens=model_template_tokens,
        files={name: None if path is None else Path(path) for name, path in files.items()},
    )


@dataclass(frozen=True)
class _Request:
    """What `generate` is asked for, except how many samples of which length."""

    task: RulerTask
    count_tokens: Callable[[str, str], int]
    """Of an input and the beginning of its answer."""
    seed: int
    answer_tokens: int
    template: str
    template_tokens: int
    files: Mapping[str, Path | None]
    prose: Haystack | None = None
    """In place of the essays of a file."""

    def check_count(self, count: int, max_seq_length: int) -> Maker:
        maker = self.maker(max_seq_length)
        if isinstance(maker, QuestionMaker) and count > len(maker.questions.questions):
            questions = maker.questions
            raise ValueError(f"{count} samples asked for, but {questions.source} are {len(questions.questions)}")
        return maker

    def samples(self, count: int, max_seq_length: int) -> list[dict[str, Any]]:
        maker = self.check_count(count, max_seq_length)
        limit = max_seq_length - self.template_tokens
        size = self.size(maker, limit)
        drafts = [self.fit(maker, i, size, limit) for i in range(count)] if size is not None else [None]
        if None in drafts:
            raise ValueError(self.does_not_fit(range(count), max_seq_length))
        return [self.sample(i, draft, max_seq_length) for i, draft in enumerate(drafts) if draft is not None]

    def size(self, maker: Maker, limit: int) -> int | None:
        """The largest size of haystack that the sample which is tried first has room for; None: not even the least."""
        return largest_fitting(
            lambda size: self._length(maker.make(PROBE, size)),
            minimum=maker.minimum(PROBE),
            maximum=maker.maximum(),
            limit=limit,
        )

    def does_not_fit(self, indices: Sequence[int], max_seq_length: int) -> str:
        """What is said then."""
        least, count = self.least_length(indices, max_seq_length), len(indices)
        return (
            f"RULER's {self.task.name} does not fit into {max_seq_length} tokens; with this tokenizer "
            f"{'this sample needs' if count == 1 else f'these {count} samples need'} at least {least}"
        )

    def fit(self, maker: Maker, index: int, size: int, limit: int) -> Draft | None:
        """The sample at `size` or the next smaller size that fits; None if none does."""
        minimum = maker.minimum(index)
        size = max(size, minimum)
        while (length := self._length(draft := maker.make(index, size))) > limit:
            if size == minimum:
                return None
            size = max(minimum, min(size - 1, floor(size * limit / length)))
        return draft

    def _length(self, draft: Draft) -> int:
        return self.count_tokens(draft.input, draft.answer_prefix) + self.answer_tokens

    def least_length(self, indices: Sequence[int], max_seq_length: int) -> int:
        """The least `max_seq_length` at which the samples fit; how a sample is made may depend on it."""
        length = max_seq_length
        while True:
            maker = self.maker(length)
            drafts = [maker.make(i, maker.minimum(i)) for i in (PROBE, *indices)]
            needed = max(self._length(draft) for draft in drafts) + self.template_tokens
            if needed <= length:
                return length
            length = needed

    def maker(self, max_seq_length: int) -> Maker:
        """What makes the samples at a length."""
        task, seed, template, files = self.task, self.seed, self.template, self.files
        if task.family == "niah":
            prose = self.prose or haystack(files["essays"])
            return NeedleMaker(task, seed, template, prose, word_list(files["words"]))
        if task.family == "variable_tracking":
            return TrackingMaker(task, seed, template, self._example_size())
        if task.family == "common_words_extraction":
            return CommonWordsMaker(task, seed, template, max_seq_length, word_list(files["words"]))
        if task.family == "freq_words_extraction":
            room = max_seq_length - self.template_tokens - self.answer_tokens
            return CodedWordsMaker(task, seed, template, max(LEAST_CODED_WORDS, room // TOKENS_A_CODED_WORD))
        return QuestionMaker(task, seed, template, question_set(task.dataset, files[task.dataset]))

    def _example_size(self) -> int:
        """Noise sentences of the tracking example: as many as fit, and at least the least."""
        sizes = TrackingMaker(self.task, self.seed, self.template, 0)
        minimum = sizes.minimum(PROBE)

        def length(size: int) -> int:
            maker = replace(sizes, example_size=size)
            return self.count_tokens(maker.example_question(rng_of(self.seed, self.task, PROBE)), "")

        found = largest_fitting(length, minimum=minimum, maximum=None, limit=TOKENS_OF_TRACKING_EXAMPLE)
        return minimum if found is None else found

    def sample(self, index: int, draft: Draft, max_seq_length: int) -> dict[str, Any]:
        length = self._length(draft)
        sample = {
            "index": index,
            "input": draft.input,
            "outputs": draft.outputs,
            "length": length,
            "length_w_model_temp": length + self.template_tokens,
            "answer_prefix": draft.answer_prefix,
            "others": {"task": self.task.name, "max_seq_length": max_seq_length, **draft.sources},
        }
        if self.task.family == "niah":
            place = draft.input.index(draft.outputs[0])
            sample["token_position_answer"] = self.count_tokens(draft.input[:place], "")
        return sample


def largest_fitting(length_of: Callable[[int], int], *, minimum: int, maximum: int | None, limit: int) -> int | None:
    """The largest size between the bounds at which `length_of` is within the limit; None if the least is not.

    Asks for a number of lengths that grows with the logarithm of the answer, none of much more than twice the limit.
    """
    if length_of(minimum) > limit:
        return None
    fits, too_much = minimum, max(2 * minimum, 2)
    while (maximum is None or too_much <= maximum) and length_of(too_much) <= limit:
        fits, too_much = too_much, 2 * too_much
    if maximum is not None:
        too_much = min(too_much, maximum + 1)
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        if length_of(middle) <= limit:
            fits = middle
        else:
            too_much = middle
    return fits
