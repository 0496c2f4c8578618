"""Compiles the Triton kernel for NVIDIA GPUs that need not be here; prints the bytes of each machine code as JSON."""

import itertools
import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_longact.reduction import STATISTICS
from megatron_longact.reduction_grid import CHANNELS_OF_BLOCK, TOKENS_OF_BLOCK
from megatron_longact.reduction_triton import _reduce

CAPABILITIES = (90, 100)
WEIGHTS = {"all": None, "masked": "*u8", "weighted": "*fp32"}
SIZES = ("num_tokens", "stretch", "token_stride", "run_stride", "width", "num_channels")


def main() -> None:
    """bf16 activations, each kind of sum and of weights."""
    powers = {(statistic.power, statistic.maximum) for statistic in STATISTICS.values()}
    sizes = {}
    for capability, kind, (power, maximum) in itertools.product(CAPABILITIES, WEIGHTS, sorted(powers)):
        constants = {
            "POWER": power,
            "MAXIMUM": maximum,
            "WEIGHTED": WEIGHTS[kind] is not None,
            "TOKENS": TOKENS_OF_BLOCK,
            "CHANNELS": CHANNELS_OF_BLOCK,
        }
        signature = {"x": "*bf16", "weights": WEIGHTS[kind] or "*bf16", "parts": "*fp32"}
        signature |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=_reduce, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        sizes[f"sm_{capability} {kind} power {power} {'maximum' if maximum else 'sum'}"] = len(compiled.asm["cubin"])
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
