"""What the tier's ranks import once: Megatron in CPU mode with Transformer Engine, torch in place of its kernels."""

import importlib
import logging
import os

from megatron_longact.megatron.cpu import enable_cpu_mode
from tests.te import torch_kernels

os.environ["NVTE_FRAMEWORK"] = "pytorch"
enable_cpu_mode(transformer_engine=True)
torch_kernels.install()
logging.disable(logging.INFO)
for module in ("megatron.training.training", "megatron_longact.longact", "tests.gpu.models"):
    importlib.import_module(module)
