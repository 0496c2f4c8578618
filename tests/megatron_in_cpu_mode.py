"""What the fork server of `tests.ranks` imports once: Megatron in CPU mode, for all ranks to share."""

import gc
import importlib
import logging

from megatron_longact.cpu import enable_cpu_mode

enable_cpu_mode()
logging.disable(logging.INFO)
for module in (
    "megatron.training.training",
    "megatron.core.tokenizers.text",  # with transformers, which each rank that makes a tokenizer would import
    "megatron_longact.longact",
    "pytest",  # so do ranks with a function of a test module
    "tests.runs",
):
    importlib.import_module(module)
gc.collect()
gc.freeze()  # what is imported stays: ranks collect after each call, and need not look at all of it each time
