"""Real tokenizers for tests: the demo's SentencePiece model, and a Hugging Face one built on the spot."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

SENTENCEPIECE = Path(__file__).parents[1] / "examples" / "demo" / "tokenizer.model"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, with a token that begins a text."""


class DemoTokenizer:
    """The demo's SentencePiece model with a Megatron tokenizer's method names, without Megatron."""

    eod = 2

    def __init__(self) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))

    def tokenize(self, text: str) -> list[int]:
        return self.model.encode(text)

    def detokenize(self, ids: list[int]) -> str:
        return self.model.decode(list(ids))

    def encode(self, text: str) -> list[int]:
        return self.tokenize(text)


class AddsTokens(DemoTokenizer):
    """The same with <s> put before each text and, if wanted, </s> behind it; it reads a <s> that is spelled out."""

    bos = 1

    def __init__(self, *, end: bool = False) -> None:
        super().__init__()
        self.behind = [self.eod] if end else []

    def tokenize(self, text: str) -> list[int]:
        first, *rest = [self.model.encode(part) for part in text.split("<s>")]
        return [self.bos, *first, *(i for part in rest for i in (self.bos, *part)), *self.behind]


def save_hugging_face_tokenizer(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, eos: str = "<|im_end|>", gap: int = 0
) -> Path:
    """A fast byte-level BPE tokenizer that puts <|bos|> before each text, saved as `transformers` saves one.

    eos: another token is added as the last; gap: ids that are left out before the last one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system: what is two and two? the answer is four."] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token=eos)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    if gap:
        file = folder / "tokenizer.json"
        saved = json.loads(file.read_text())
        saved["added_tokens"][-1]["id"] += gap
        saved["model"]["vocab"].pop(saved["added_tokens"][-1]["content"], None)
        file.write_text(json.dumps(saved))
    return folder


def build_megatron_tokenizer(tokenizer_type: str, model: Path, **flags: Any) -> Any:
    """The tokenizer that Megatron builds from its flags."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    given = {
        "tokenizer_type": tokenizer_type,
        "tokenizer_model": str(model),
        "metadata_path": None,
        "vocab_file": None,
        "merge_file": None,
        "special_tokens": None,
        "chat_template": None,
        "trust_remote_code": False,
        "tokenizer_hf_no_use_fast": False,
        "tokenizer_hf_no_include_special_tokens": False,
        "tokenizer_sentencepiece_legacy": False,
        "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
        "pad_vocab_size": False,
    }
    return build_tokenizer(Namespace(**{**given, **flags}))
