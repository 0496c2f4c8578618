"""LongAct for NVIDIA megatron-core: RL updates of the salient rows of W_Q and W_K alone."""

from typing import TYPE_CHECKING, Any

from megatron_longact.arguments import add_longact_args, longact_config_from_args
from megatron_longact.config import LongActConfig
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.selection import select_salient_channels

if TYPE_CHECKING:
    from megatron_longact.longact import LongAct

__all__ = [
    "LongAct",
    "LongActConfig",
    "QKVLayout",
    "add_longact_args",
    "longact_config_from_args",
    "select_salient_channels",
]


def __getattr__(name: str) -> Any:
    """`LongAct` on first use: it imports Megatron, which the CPU mode must be able to precede."""
    if name != "LongAct":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_longact.longact import LongAct

    return LongAct
