"""NVIDIA's `train_rl.py`, unedited, on ready-made rollouts: MEGATRON_LM is its folder, which must be on the path.

Its two extension points are set before it runs: the registry of agents, so that an environment file can name
ours, and the inference interface, which it would launch otherwise. What LongAct saw of each optimizer step goes
into a file a rank, FORWARDS-<rank>.jsonl.
"""

import json
import os
import runpy
from pathlib import Path
from typing import Any

AGENT = "ReadyMadeAgent"


def watch(path: Path) -> None:
    """Write, for each optimizer step, the passes through linear_qkv and the tokens that LongAct counted."""
    import torch

    from megatron_longact import LongAct

    calls = {True: 0, False: 0}
    attach, refresh = LongAct.attach, LongAct.refresh

    def count(*_: Any) -> None:
        calls[torch.is_grad_enabled()] += 1

    def attach_and_watch(model_chunks: Any, *rest: Any) -> LongAct:
        for chunk in model_chunks:
            for name, module in chunk.named_modules():
                if name.endswith("linear_qkv"):
                    module.register_forward_hook(count)
        return attach(model_chunks, *rest)

    def refresh_and_write(longact: LongAct) -> None:
        refresh(longact)
        assert longact.step is not None
        tokens = longact.step.tokens.tolist()
        with path.open("a") as file:
            print(json.dumps({"training": calls[True], "other": calls[False], "tokens": tokens}), file=file)
        calls.update({True: 0, False: 0})

    LongAct.attach = attach_and_watch  # type: ignore[method-assign]
    LongAct.refresh = refresh_and_write  # type: ignore[method-assign]


def main() -> None:
    """Put the stand-ins in their places and run it."""
    import megatron.rl.rl_utils
    from megatron.rl.agent.registry import AGENT_REGISTRY

    from tests.programs.ready_made_agent import NoEngine

    AGENT_REGISTRY[AGENT] = "tests.programs.ready_made_agent:ReadyMadeAgent"
    megatron.rl.rl_utils._INFERENCE_INTERFACE = NoEngine()
    watch(Path(f"{os.environ['FORWARDS']}-{os.environ['RANK']}.jsonl"))
    runpy.run_path(str(Path(os.environ["MEGATRON_LM"], "train_rl.py")), run_name="__main__")


if __name__ == "__main__":
    main()
