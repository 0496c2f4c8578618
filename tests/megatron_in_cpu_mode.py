"""What the fork server of `tests.ranks` imports once: Megatron in CPU mode, for all ranks to share."""

import importlib
import logging

from megatron_longact.cpu import enable_cpu_mode

enable_cpu_mode()
logging.disable(logging.INFO)
for module in ("megatron.training.training", "megatron_longact.longact", "tests.models"):
    importlib.import_module(module)
