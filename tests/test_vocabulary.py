"""Which ids can be drawn and which end a response, of tokenizers that Megatron builds, and what engines are told."""

from __future__ import annotations

import io
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_longact.evaluation.arguments import add_evaluation_args
from megatron_longact.rl.data.arguments import add_data_args
from tests import ranks
from tests.tokenizers import SENTENCEPIECE, build_megatron_tokenizer, save_hugging_face_tokenizer

GAP = 100
CHATS = {
    "end": "{% for m in messages %}<|im_start|>{{ m['content'] }} <|im_end|>\n{% endfor %}",
    "no token": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "nothing": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
    "not the answer": "{{ messages[0]['content'] }}<|im_end|>",
    "refuses": "{{ raise_exception('no') }}",
}


def vocabularies(tokenizer_type: str, model: Path, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Megatron's arguments make of a tokenizer, or the refusal, for each of the settings."""
    from megatron_longact.generation.vocabulary import vocabulary_from_args

    tokenizer = build_megatron_tokenizer(tokenizer_type, model)
    found = []
    for given in settings:
        args = {"padded_vocab_size": 1024, "vocab_size": None, "chat_template": None, **given}
        try:
            made = vocabulary_from_args(
                Namespace(tokenizer_model=str(model), tokenizer_type=tokenizer_type, **args), tokenizer
            )
            found.append({**vars(made), "eod": made.eod, "largest": tokenizer.eod})
        except ValueError as error:
            found.append({"error": str(error)})
    return found


def run(model: Path, *settings: dict[str, Any], tokenizer_type: str = "HuggingFaceTokenizer") -> list[dict[str, Any]]:
    [found] = ranks.run(vocabularies, tokenizer_type=tokenizer_type, model=model, settings=list(settings))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer whose end of text is its last token, behind a gap, and with a chat template that ends otherwise."""
    return save_hugging_face_tokenizer(tmp_path / "hf", chat_template=CHATS["end"], eos="<|endoftext|>", gap=GAP)


def test_ids_reach_to_the_largest_and_must_have_embeddings(folder: Path) -> None:
    [made] = run(folder, {})
    last = made["eod"]
    assert made["size"] == last + 1
    [fits, too_few, converted, unknown] = run(
        folder,
        {"padded_vocab_size": last + 1},
        {"padded_vocab_size": last},
        {"hf_vocab_size": last - 1},
        {"padded_vocab_size": None},
    )
    assert fits["size"] == unknown["size"] == last + 1
    assert f"the tokenizer {folder} makes ids up to {last}, but the model has {last} embeddings" in too_few["error"]
    assert f"but the model has {last - 1} embeddings" in converted["error"]
    assert "\n" not in too_few["error"]
    [demo] = run(SENTENCEPIECE, {}, tokenizer_type="SentencePieceTokenizer")
    assert (demo["size"], demo["stop_ids"]) == (1024, (2,))
    assert demo["remark"] == "responses end at </s> (2, of the tokenizer)"


def test_a_converted_model_says_how_many_embeddings_are_real(tmp_path: Path) -> None:
    from megatron_longact.conversion.hf_config import model_from_config
    from megatron_longact.conversion.megatron_args import common_state, completing
    from megatron_longact.generation.vocabulary import embeddings_of
    from tests.conversion import config_of

    saved = common_state(model_from_config(config_of("qwen3", vocab_size=260).to_dict()), tokenizer=None)["args"]
    args = Namespace(padded_vocab_size=saved.padded_vocab_size, vocab_size=None, load=str(tmp_path))
    args.tokenizer_type = args.tokenizer_model = None
    assert embeddings_of(args) == 384  # Megatron's padding
    completing(lambda args, load_arg: (args, saved))(args)  # --use-checkpoint-args
    assert embeddings_of(args) == 260


@contextmanager
def megatron_with(tokenizer: Any, args: Namespace) -> Iterator[None]:
    """Megatron's global arguments and tokenizer, for what asks for them."""
    from megatron.training import global_vars

    global_vars.set_args(args)
    global_vars._GLOBAL_TOKENIZER = tokenizer
    try:
        yield
    finally:
        global_vars.unset_global_variables()


def args_of(model: Path, **given: Any) -> Namespace:
    names = {"tokenizer_model": str(model), "tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}
    return Namespace(**names, chat_template=None, stop_token_ids=None, rank=0, **given)


def starts(model: Path) -> dict[str, str]:
    """How each program that reads a checkpoint begins with a tokenizer that is too large: what it says, the refusal."""
    from megatron_longact.analysis.activations import megatron as activations_megatron
    from megatron_longact.analysis.disrupt import program as disrupt_program
    from megatron_longact.evaluation import program as evaluation
    from megatron_longact.rl import program as rl

    args, said, later = args_of(model, padded_vocab_size=256), io.StringIO(), Any
    begin: dict[str, Callable[[], Any]] = {
        "train": lambda: rl.environment_of(later, say=said.write),
        "evaluate": lambda: evaluation.Evaluation(args, later, iteration="1", terminal=said),
        "disrupt": lambda: disrupt_program.Disruption(args, later, folder=model, terminal=said),
        "observe": lambda: activations_megatron.check_tokenizer(args, activations_megatron.get_tokenizer()),
    }
    refused = {}
    with megatron_with(build_megatron_tokenizer("HuggingFaceTokenizer", model), args):
        for name, call in begin.items():
            try:
                call()
            except ValueError as error:
                refused[name] = said.getvalue() + str(error)
    return refused


def test_every_program_refuses_a_tokenizer_that_is_too_large_before_anything_else(folder: Path) -> None:
    [last] = [made["eod"] for made in run(folder, {})]
    [refused] = ranks.run(starts, model=folder)
    assert list(refused) == ["train", "evaluate", "disrupt", "observe"]
    for error in refused.values():
        assert error.startswith(f"the tokenizer {folder} makes ids up to {last}, but the model has 256 embeddings")


def test_stop_ids_are_those_of_the_tokenizer_the_generation_config_and_the_template(folder: Path) -> None:
    config = folder / "generation_config.json"
    *by_template, no_more, other = run(
        folder, *({"chat_template": chat} for chat in CHATS.values()), {}, {"stop_token_ids": [7, 9]}
    )
    last = no_more["eod"]
    assert [made["stop_ids"] for made in by_template] == [(last, 2), *[(last,)] * 4]
    assert no_more["stop_ids"] == (last, 2)
    assert no_more["remark"] == (
        f"responses end at <|endoftext|> ({last}, of the tokenizer), <|im_end|> (2, of the chat template)"
    )
    assert (other["stop_ids"], other["eod"]) == ((7, 9), 7)
    for said, expected in (([2, 5, 5000], (last, 2, 5)), (5, (last, 5, 2)), (None, (last, 2))):
        config.write_text(json.dumps({"eos_token_id": said}))
        assert run(folder, {})[0]["stop_ids"] == expected
    assert "<|im_end|> (2, of generation_config.json and the chat template)" in _remark(config, [2, last])
    for text, message in (
        ('{"eos_token_id": "2"}', "must be one token id or a list"),
        ("{", "not JSON"),
        ("[]", "must be"),
    ):
        config.write_text(text)
        refused, by_hand = run(folder, {}, {"stop_token_ids": [2]})
        assert message in refused["error"]
        assert by_hand["stop_ids"] == (2,)
    config.unlink()
    [wrong] = run(folder, {"stop_token_ids": [2, last + 1]})
    assert f"--stop-token-ids has {last + 1}, but the tokenizer" in wrong["error"]


def _remark(config: Path, ids: list[int]) -> str:
    config.write_text(json.dumps({"eos_token_id": ids}))
    remark: str = run(config.parent, {})[0]["remark"]
    return remark


def test_a_tokenizer_without_an_end_needs_one_by_hand(folder: Path) -> None:
    from transformers import AutoTokenizer

    endless = AutoTokenizer.from_pretrained(folder)
    endless.eos_token = endless.chat_template = None
    endless.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    refused, by_hand = run(folder, {}, {"stop_token_ids": [2]})
    assert (
        "has no end-of-text (eos) token, so no response could end by itself; give --stop-token-ids" in refused["error"]
    )
    assert by_hand["stop_ids"] == (2,)


def test_both_programs_take_the_ids_by_hand() -> None:
    for add, needed in ((add_data_args, []), (add_evaluation_args, ["--benchmark", "ruler"])):
        assert add(ArgumentParser()).parse_args([*needed, "--stop-token-ids", "2", "296"]).stop_token_ids == [2, 296]
        assert not add(ArgumentParser()).parse_args(needed).stop_token_ids


def told_to_the_engine(model: Path) -> dict[str, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_longact.generation.from_args import rollout_engine
    from tests.models import ModelSpec, build

    chunks = build(ModelSpec(layers=1, vocab=512)).chunks
    args = args_of(model, padded_vocab_size=512, inference_max_requests=4, inference_dynamic_batching=False)
    with megatron_with(build_megatron_tokenizer("HuggingFaceTokenizer", model), args):
        engine: Any = rollout_engine(args, chunks, ProcessGroupCollection.use_mpu_process_groups())
    return {"size": engine.vocab_size, "eod": engine.ends.eod, "others": tuple(engine.ends.others)}


def test_the_engine_draws_below_the_bound_and_stops_at_each(folder: Path) -> None:
    [made] = run(folder, {"padded_vocab_size": 512})
    [told] = ranks.run(told_to_the_engine, model=folder)
    assert told == {"size": made["eod"] + 1, "eod": made["eod"], "others": (2,)}
