"""Prompts out of pieces, with tokenizers that put `<s>` before a text, `</s>` behind it, both or neither."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.analysis.activations.hf import LocalTokenizer
from megatron_longact.analysis.activations.prompts import PromptOptions
from megatron_longact.evaluation.arguments import add_evaluation_args, config_from_args
from megatron_longact.tasks import longbench_v2
from megatron_longact.tasks.benchmarks import benchmark_from, why_alone
from megatron_longact.tasks.chat import ChatTemplate, PromptEncoder
from megatron_longact.tasks.needle import NEEDLE_TASKS, NeedleGenerator
from megatron_longact.tasks.pieces import PieceEncoder
from tests.tokenizers import AddsTokens, DemoTokenizer, save_hugging_face_tokenizer

BOS = AddsTokens.bos


@dataclass(frozen=True)
class Reader:
    """A tokenizer as prompts want it, and room."""

    encode: Callable[[str], list[int]]
    positions: int = 4096
    chat_template: Callable[[], ChatTemplate | None] = lambda: None


PLAIN = DemoTokenizer()
KINDS: dict[str, Callable[[], DemoTokenizer]] = {
    "<s>": AddsTokens,
    "<s> and </s>": lambda: AddsTokens(end=True),
    "nothing": DemoTokenizer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_has_nothing_added_and_a_prompt_begins_once(kind: str) -> None:
    pieces = PieceEncoder(KINDS[kind]().tokenize)
    begin = [] if kind == "nothing" else [BOS]
    assert pieces.prefix == begin
    assert pieces.piece("two words") == PLAIN.tokenize("two words")
    assert pieces.piece("") == []
    assert pieces.prompt("two words") == pieces.encode("two words") == [*begin, *PLAIN.tokenize("two words")]
    assert pieces.begun([]) == begin
    assert pieces.begun([*begin, 7, 8]) == pieces.begun([7, 8]) == [*begin, 7, 8]


def test_a_prompt_that_spells_the_beginning_begins_once() -> None:
    pieces = PieceEncoder(AddsTokens().tokenize)
    assert pieces.prompt("<s>two words") == pieces.prompt("two words")
    encoder = PromptEncoder(AddsTokens(end=True))
    assert encoder.encode("<s>two words").tokens == (BOS, *PLAIN.tokenize("two words"))


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needle_prompts_begin_once_and_keep_their_length(task: str) -> None:
    plain = NeedleGenerator(PLAIN, tasks=[task], lengths=(255,), seed=1).sample(0, 0)
    for end in (False, True):
        sample = NeedleGenerator(AddsTokens(end=end), tasks=[task], lengths=(256,), seed=1).sample(0, 0)
        assert sample.prompt_ids == (BOS, *plain.prompt_ids)
        assert (sample.references, sample.depths) == (plain.references, plain.depths)


TEMPLATES = {
    "none": "{task_template}",
    "chat": "<user>{task_template}</user>\\n",
    "chat with <s>": "<s><user>{task_template}</user>\\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("end", [False, True])
def test_prompts_of_benchmarks_begin_once(template: str, end: bool, tmp_path: Path) -> None:
    item = {
        "_id": "a",
        "question": "Q?",
        "answer": "A",
        "difficulty": "easy",
        "length": "short",
        "context": "w x. " * 99,
    }
    item |= {f"choice_{letter}": letter for letter in "ABCD"}
    (tmp_path / "data.json").write_text(json.dumps([item]))
    longbench = ("--benchmark", "longbench-v2", "--data", str(tmp_path / "data.json"), "--max-length", "200")
    ruler = ("--benchmark", "ruler", "--tasks", "niah_single_1", "--lengths", "512", "--num-samples", "1")
    made = {}
    for flags in (longbench, ruler):
        given = (*flags, "--model-template", TEMPLATES[template])
        config = config_from_args(add_evaluation_args(argparse.ArgumentParser()).parse_args(given))
        [group] = benchmark_from(config.benchmark, vars(config)).samples(AddsTokens(end=end), positions=1024)
        [sample] = group.make()
        made[flags[1]] = tokens = list(sample.tokens)
        assert [i for i, token in enumerate(tokens) if token == BOS] == [0]
        assert AddsTokens.eod not in tokens
    assert len(made["ruler"]) <= 512 - 128
    cut = longbench_v2.truncate([BOS, *PLAIN.encode(longbench_v2.build_prompt(item))], 200)[1:]
    before, after = TEMPLATES[template].replace("<s>", "").replace("\\n", "\n").split("{task_template}")
    around = [PLAIN.encode(text) if text else [] for text in (before, after)]
    assert made["longbench-v2"] == [BOS, *around[0], *cut, *around[1]]


def test_observed_prompts_and_windows_begin_once(tmp_path: Path) -> None:
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("one two three four five six seven. " * 20)
    rows.write_text(json.dumps({"input": "one\u2028two", "answer_prefix": None}, ensure_ascii=False) + "\n")
    reader = Reader(AddsTokens(end=True).encode)

    def prompts(file: Path | None, length: int | None) -> list[list[int]]:
        options = PromptOptions(tasks=("niah_single_2",), lengths=(length,), num_samples=3, file=file)
        return options.prompts(reader, task="niah_single_2", length=length)

    ids = PLAIN.encode(text.read_text())
    windows = [[BOS, *ids[i : i + 15]] for i in range(0, len(ids) - 14, 15)]
    drawn = random.Random(42)
    drawn_windows = [windows[i] for i in drawn.sample(range(len(windows)), 3)]
    assert prompts(text, 16) == drawn.sample(drawn_windows, 3)
    assert prompts(text, None) == [[BOS, *ids]]
    assert prompts(rows, None) == [[BOS, *PLAIN.encode("one\u2028two")]]  # a line for JSON, two for splitlines()
    for prompt in prompts(None, 400):
        assert [i for i, token in enumerate(prompt) if token == BOS] == [0]
        assert len(prompt) <= 400


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"tokens": [1, "2"]}', "'tokens' must be token ids"),
        ('{"tokens": [1, null]}', "'tokens' must be token ids"),
        ('{"tokens": [1, -2]}', "'tokens' must be token ids"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": null}', "has neither tokens nor a text"),
    ],
)
def test_lines_that_are_no_prompts_are_named(line: str, said: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"text": "good"}}\n{line}\n')
    options = PromptOptions(tasks=("x",), lengths=(None,), file=rows)
    with pytest.raises(ValueError, match=said) as caught:
        options.prompts(Reader(PLAIN.tokenize, 64), task="x", length=None)
    assert str(caught.value).startswith(f"{rows}, line 2")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A Hugging Face tokenizer that puts <|bos|> before a text, with a chat template that writes it too."""
    tokenizer = LocalTokenizer(save_hugging_face_tokenizer(tmp_path_factory.mktemp("hf")), vocab_size=1000)
    return Reader(tokenizer.encode, 4096, tokenizer.chat_template)


def options(**flags: Any) -> PromptOptions:
    return PromptOptions(tasks=("niah_single_1",), lengths=(800,), num_samples=2, **flags)


def test_a_prompt_is_a_turn_of_the_chat_template_where_there_is_one(chatty: Reader) -> None:
    """Token by token what `transformers` makes of the turn, with the beginning of RULER's answer behind it."""
    framing = options().framing_for(chatty)
    assert framing.remark == "each prompt is a user's turn of the chat template (--no-apply-chat-template: alone)"
    before, behind = framing.model_template.split("{task_template}")
    assert (before, behind) == ("<|bos|><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    pieces, chat = PieceEncoder(chatty.encode), chatty.chat_template()
    assert chat is not None
    made = options().prompts(chatty, task="niah_single_1", length=800)
    for ids in made:
        turn, answer = chat.tokenizer.decode(ids).removeprefix(before).split(behind)
        asked = chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, return_dict=False
        )
        assert ids == [*asked, *pieces.piece(answer)]
        assert "special magic number" in answer
        assert len(ids) <= 800
    alone = options(apply_chat_template=False)
    assert alone.framing_for(chatty).remark == "nothing stands around a prompt: --no-apply-chat-template"
    plain = alone.prompts(chatty, task="niah_single_1", length=800)
    assert plain == alone.prompts(Reader(chatty.encode), task="niah_single_1", length=800)
    assert plain != made
    assert "no chat template" in options().framing_for(Reader(chatty.encode)).remark


def test_what_cannot_stand_around_a_prompt_is_refused(chatty: Reader) -> None:
    def refused(said: str, reader: Reader = chatty, **flags: Any) -> None:
        with pytest.raises(ValueError, match=said):
            options(**{"apply_chat_template": True, **flags}).framing_for(reader)

    refused("the tokenizer has no chat template", Reader(chatty.encode))
    refused("both say what is around a prompt", model_template="<{task_template}>")
    refused("the text of --prompts is taken as it is", file=Path("text.txt"))
    tokenizer = chatty.chat_template().tokenizer  # type: ignore[union-attr]
    for template, said in (
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "into its text once"),
        ("{{ messages[0]['content'] | upper }}", "into its text once"),
        ("{{ messages[0]['content'] | replace('two', 'three') }}", "changes what stands in a user's turn"),
        ("{{ raise_exception('none of that') }}", "none of that"),
    ):
        refused(said, Reader(chatty.encode, 4096, lambda jinja=template: ChatTemplate(tokenizer, jinja)))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ruler", "needle", "longbench-v2", "infinitebench"])
def test_the_chat_template_of_evaluation_has_both_spellings(name: str, chatty: Reader) -> None:
    parser = add_evaluation_args(argparse.ArgumentParser())
    for spelling in ("--apply-chat-template", "--apply_chat_template"):
        config = config_from_args(parser.parse_args(["--benchmark", name, spelling]))
        assert config.apply_chat_template is True
        off = config_from_args(parser.parse_args(["--benchmark", name, spelling.replace("--", "--no-", 1)]))
        assert off.apply_chat_template is False
    if name == "needle":
        with pytest.raises(ValueError, match="--apply-chat-template does not go with these prompts: needle prompts"):
            config.framing(chatty.encode, chatty.chat_template, alone=why_alone(name))
    else:
        framed = config.framed(config.framing(chatty.encode, chatty.chat_template, alone=why_alone(name)))
        assert vars(benchmark_from(name, vars(framed)))["model_template"].startswith("<|bos|><|im_start|>user")
