"""A GGUF file becomes a Hugging Face folder: weights in bf16, config.json, tokenizer with its chat template.

    PYTHONPATH=PACKAGES python examples/smollm2/make_folder.py MODEL.gguf FOLDER

PACKAGES holds `gguf` and `accelerate`, with which `transformers` reads such a file. Its quantisation stays: the weights
are the file's, to the three digits of bf16.
"""

import sys
from pathlib import Path

import torch
import transformers


def make_folder(file: Path, folder: Path) -> None:
    """Write `folder`, which must not exist; it appears when it is complete."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    make_folder(Path(sys.argv[1]), Path(sys.argv[2]))
