"""What the fork server of `tests.ranks` imports once: Megatron in CPU mode, for all ranks to share."""

import gc
import importlib
import inspect
import logging
from argparse import ArgumentParser
from functools import cache

from megatron_longact.megatron.cpu import enable_cpu_mode

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
inspect.getsource = cache(inspect.getsource)  # Megatron makes flags of the source of 31 classes, twice in each program
importlib.import_module("megatron.training.arguments").add_megatron_arguments(ArgumentParser())
gc.collect()
gc.freeze()  # what is imported stays: ranks collect after each call, and need not look at all of it each time
