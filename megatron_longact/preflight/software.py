"""Libraries of a rank."""

from importlib import import_module, metadata

import torch

from megatron_longact.preflight.checks import NotHereError


def versions() -> str:
    """Of torch and megatron-core."""
    return f"torch {torch.__version__}, megatron-core {metadata.version('megatron-core')}"


def transformer_engine() -> str:
    """Transformer Engine imports; without a GPU it is not looked for."""
    if torch.cuda.device_count() == 0:
        raise NotHereError("no GPU is visible")
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        raise ValueError("Transformer Engine is not installed: pip install 'megatron-core[te]'") from None
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        raise ValueError(f"Transformer Engine {version} cannot be imported: {error}") from error
    return f"Transformer Engine {version}"
