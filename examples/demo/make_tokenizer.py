"""Train the demo's SentencePiece tokenizer on its own training text; writes tokenizer.model.

    python examples/demo/make_tokenizer.py [--output examples/demo/tokenizer.model]

Pieces that the needle tasks lean on are fixed instead of learnt: a key is one token (" falcon"), also where " is:"
follows it (" falcon is:"), a value is one (" 47"), and so is each phrase of the templates that never changes. So a
needle is 4 tokens, four needles with their question fit 48, and a model of 0.7 M parameters learns them there within
minutes. Id 0 is the unknown piece: RL code exists that takes id 0 for "nothing here", so neither padding nor
end-of-text may have it.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import sentencepiece

from megatron_longact.tasks.needle import KEYS, TEMPLATES, NeedleGenerator, sentences_of

VOCAB_SIZE = 1024
NUM_TEMPLATES = 300


class _Words:
    """Stands in for the tokenizer while there is none: one id a word, enough to make prompts."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
        return [self._ids[word] for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(self._words[i] for i in ids)


def fixed_pieces() -> list[str]:
    """Keys, values and the templates' phrases, each one piece."""
    keys = [f"▁{word}{end}" for word in KEYS for end in ("", "▁is:")]
    values = [f"▁{n}" for n in range(10, 100)]
    return keys + values + template_phrases()


def template_phrases() -> list[str]:
    """What stands between the placeholders, as SentencePiece writes it: blanks are "▁", one before each phrase."""
    parts = [part.strip() for template in TEMPLATES for part in re.split(r"\{\w+\}", template)]
    phrases = dict.fromkeys("▁" + part.replace(" ", "▁") for part in parts if len(part) > 1)
    return list(phrases)


def training_text() -> list[str]:
    """The prose of the training split, and prompts with answers."""
    generator = NeedleGenerator(_Words(), lengths=[120], seed=0)
    samples = [generator.sample(0, index) for index in range(NUM_TEMPLATES)]
    return [*sentences_of("train"), *(s.prompt + s.answer for s in samples)]


def train_tokenizer() -> bytes:
    """The serialised SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text()),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        character_coverage=1.0,
        user_defined_symbols=fixed_pieces(),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Write the model to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tokenizer.model"))
    args = parser.parse_args()
    args.output.write_bytes(train_tokenizer())
    print(f"{args.output}: {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
