"""ms-swift's own command line on a machine without a GPU: Megatron in CPU mode, torch in place of TE's kernels.

    python tests/trainers/swift_on_cpu.py sft|rlhf <flags of `megatron sft` or `megatron rlhf`>

PYTORCH_JIT must be 0: ms-swift scripts functions that call what the CPU mode wraps.
"""

import sys

# isort: off
import tests.te.transformer_engine_on_cpu  # noqa: F401
import swift.megatron.trainers.grpo_trainer  # noqa: F401
from accelerate import PartialState
from swift.megatron import megatron_rlhf_main, megatron_sft_main
from tests.launch import ROOT

if __name__ == "__main__":
    sys.path.append(str(ROOT / "examples" / "integrations"))  # for swift_ready_made.py
    PartialState(cpu=True)  # else it takes a process without a GPU for the only one, and gathers nothing
    {"sft": megatron_sft_main, "rlhf": megatron_rlhf_main}[sys.argv[1]](sys.argv[2:])
