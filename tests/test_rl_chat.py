"""Prompts into tokens, through Megatron's tokenizer builder: Hugging Face and SentencePiece, strings and messages."""

from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.tokenizers import CHAT_TEMPLATE, SENTENCEPIECE, build_megatron_tokenizer, save_hugging_face_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is two and two?"}]
RENDERED = (
    "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwhat is two and two?<|im_end|>\n<|im_start|>assistant\n"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
PLAIN = "system: be brief user: what is two and two? assistant:"


def encode(
    tokenizer_type: str, model: Path, prompt: Any, *, chat_template: str | None = None, **flags: Any
) -> dict[str, Any]:
    """What an encoder makes of a prompt, with what the tokenizer makes of some texts; an error as text."""
    from megatron_longact.tasks.chat import PromptEncoder, read_chat_template

    tokenizer = build_megatron_tokenizer(tokenizer_type, model, chat_template=chat_template, **flags)
    try:
        encoded = PromptEncoder(tokenizer, chat_template=read_chat_template(chat_template)).encode(prompt)
    except ValueError as error:
        return {"error": str(error)}
    ids = list(encoded.tokens)
    return {
        "text": encoded.text,
        "ids": ids,
        "decoded": tokenizer.detokenize(ids),
        "of_text": tokenizer.tokenize(encoded.text),
        "bos": tokenizer.bos,
    }


def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
    names = ("tokenizer_type", "model", "prompt")
    [result] = ranks.run(encode, **dict(zip(names, args, strict=True)), **kwargs)
    return result


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hugging_face_tokenizer(tmp_path_factory.mktemp("hf"))


def test_messages_become_what_transformers_makes_of_them(hugging_face: Path) -> None:
    from transformers import AutoTokenizer

    got = run("HuggingFaceTokenizer", hugging_face, MESSAGES)
    theirs = AutoTokenizer.from_pretrained(hugging_face)
    assert got["text"] == got["decoded"] == "<|bos|>" + RENDERED
    assert got["ids"] == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert got["ids"].count(got["bos"]) == 1  # tokenizing the text anew would add a second one
    assert got["of_text"] == [got["bos"], *got["ids"]]


def test_strings_are_tokenized_as_the_tokenizer_does(hugging_face: Path) -> None:
    text = "what is two and two?"
    got = run("HuggingFaceTokenizer", hugging_face, text)
    assert got["text"] == text
    assert got["decoded"] == "<|bos|>" + text
    assert got["ids"] == got["of_text"]
    assert run("HuggingFaceTokenizer", hugging_face, "<|bos|>" + text)["ids"] == got["ids"]  # one that spells it
    without = run("HuggingFaceTokenizer", hugging_face, text, tokenizer_hf_no_include_special_tokens=True)
    assert [got["bos"], *without["ids"]] == got["ids"]


def test_a_template_file_replaces_the_tokenizers_own(hugging_face: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN_TEMPLATE)
    from_file = run("HuggingFaceTokenizer", hugging_face, MESSAGES, chat_template=str(file))
    assert from_file["text"] == from_file["decoded"] == PLAIN
    assert run("HuggingFaceTokenizer", hugging_face, MESSAGES, chat_template=PLAIN_TEMPLATE) == from_file


def test_sentencepiece_with_a_template(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN_TEMPLATE)
    got = run("SentencePieceTokenizer", SENTENCEPIECE, MESSAGES, chat_template=str(file))
    assert got["text"] == PLAIN
    assert got["ids"] == got["of_text"]
    assert got["decoded"] == PLAIN
    string = run("SentencePieceTokenizer", SENTENCEPIECE, PLAIN)
    assert string["ids"] == got["ids"]


@pytest.mark.parametrize("tokenizer_type", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_messages_without_a_template_are_refused(tokenizer_type: str, tmp_path: Path) -> None:
    is_hf = tokenizer_type == "HuggingFaceTokenizer"
    model = save_hugging_face_tokenizer(tmp_path, chat_template=None) if is_hf else SENTENCEPIECE
    got = run(tokenizer_type, model, MESSAGES)
    assert got["error"].startswith("the prompt is a list of messages, but the tokenizer has no chat template")
    assert "\n" not in got["error"]
    assert "error" not in run(tokenizer_type, model, "a string")


@pytest.mark.parametrize("tokenizer_type", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_a_template_that_refuses_says_why(tokenizer_type: str, hugging_face: Path) -> None:
    refuses = "{{ raise_exception('roles must alternate') }}"
    model = hugging_face if tokenizer_type == "HuggingFaceTokenizer" else SENTENCEPIECE
    got = run(tokenizer_type, model, MESSAGES, chat_template=refuses)
    assert got["error"] == "the chat template failed on these messages: roles must alternate"


def test_a_template_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from megatron_longact.tasks.chat import read_chat_template

    assert read_chat_template(None) is None
    assert read_chat_template(CHAT_TEMPLATE) == CHAT_TEMPLATE
    named = tmp_path / "a{b}.jinja"
    named.write_text(CHAT_TEMPLATE)
    assert read_chat_template(str(named)) == CHAT_TEMPLATE
    with pytest.raises(ValueError, match=r"--chat-template nowhere.jinja: not a template, and not a file"):
        read_chat_template("nowhere.jinja")
