"""slime's own Megatron backend on a machine without a GPU: its arguments, model, training step and checkpoints.

    PYTHONPATH=path/to/slime python tests/trainers/slime_on_cpu.py ROLLOUTS <slime's flags>

The order is that of `MegatronTrainRayActor` (slime/backends/megatron_utils/actor.py), without Ray; rollouts are ready
made, as `--debug-train-only` has them. Not here: SGLang and wandb, of which slime imports names that it then does not
call, and numpy 1, which it asserts (initialize.py) for a Megatron that is older than this one.
"""

import sys
from types import ModuleType
from typing import Any

import numpy
import torch

from megatron_longact.megatron.cpu import CPU_MODE_FLAGS, enable_cpu_mode

SAMPLES, STEPS = 8, 2
"""Of a rollout."""


def stand_in(name: str, **members: Any) -> None:
    """A module of that name, and the packages around it, with these members."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(members)
    package, _, leaf = name.rpartition(".")
    if package:
        if package not in sys.modules:
            stand_in(package)
        setattr(sys.modules[package], leaf, module)


def rollout(index: int) -> dict[str, Any]:
    """What slime's data plane hands to a rank, of two steps with two micro-batches of two samples each."""
    generator = torch.Generator().manual_seed(index)
    responses = [4 + i % 3 for i in range(SAMPLES)]
    lengths = [6 + (index + i) % 5 + response for i, response in enumerate(responses)]
    per_token = {
        "loss_masks": [torch.ones(n) for n in responses],
        "log_probs": [torch.full((n,), -5.7) for n in responses],
        "rollout_log_probs": [torch.full((n,), -5.7) for n in responses],
        "advantages": [torch.full((n,), (-1.0) ** i) for i, n in enumerate(responses)],
        "returns": [torch.zeros(n) for n in responses],
    }
    return {
        "tokens": [torch.randint(1, 300, (n,), generator=generator) for n in lengths],
        "total_lengths": lengths,
        "response_lengths": responses,
        "rollout_mask_sums": [torch.tensor(float(n)) for n in responses],
        "micro_batch_indices": [[i, i + 1] for i in range(0, SAMPLES, 2)],
        **per_token,
    }


def local_spec(args: Any, config: Any, vp_stage: int | None) -> Any:
    """`--spec`: the layers that slime builds; it asks for `args.moe_use_legacy_grouped_gemm`, which 0.19.2 lacks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm)


def register_cpu() -> None:
    """Give slime an accelerator, which it asks for by name: the CPU, by `torch.cuda` as the CPU mode leaves it."""
    from slime.utils.accelerator import register_accelerator
    from slime.utils.accelerator.cuda import CUDAAccelerator

    class CPU(CUDAAccelerator):  # type: ignore[misc]
        name = device_type = "cpu"

        def is_available(self) -> bool:
            return True

        def current_device(self) -> int:
            return 0

        def device_name(self, index: Any = None) -> str:
            return "cpu"

    register_accelerator("cpu", CPU)


def main(rollouts: int) -> None:
    """Train until that rollout, saving after each."""
    from slime.backends.megatron_utils.data import get_data_iterator
    from slime.backends.megatron_utils.initialize import init
    from slime.backends.megatron_utils.model import initialize_model_and_optimizer, save, train
    from slime.utils.arguments import parse_args

    args = parse_args()
    torch.distributed.init_process_group("gloo")
    args.rank, args.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    numpy.__version__ = "1.26"  # init asserts it
    init(args)
    model, optimizer, scheduler, last = initialize_model_and_optimizer(args)
    first = last + 1 if args.start_rollout_id is None else args.start_rollout_id
    for index in range(first, rollouts):
        train(index, model, optimizer, scheduler, get_data_iterator(rollout(index)), [2] * STEPS, [4] * STEPS)
        save(index, model, optimizer, scheduler)
    torch.distributed.barrier()


if __name__ == "__main__":
    enable_cpu_mode()
    import accelerate  # noqa: F401 (it looks for wandb, and must not find this one)

    stand_in("wandb")
    stand_in("sglang.srt.server_args", ServerArgs=object)
    stand_in("sglang_router.launch_router", RouterArgs=object)
    register_cpu()
    rollouts = int(sys.argv.pop(1))
    sys.argv += ["--debug-train-only", "--spec", "tests.trainers.slime_on_cpu", "local_spec", *CPU_MODE_FLAGS]
    main(rollouts)
