"""LongAct in ms-swift's Megatron trainers, by a callback of theirs.

    megatron rlhf --rlhf_type grpo ... \
        --external_plugins examples/integrations/swift_plugin.py --callbacks longact

The same two flags do for `megatron sft`, `pt` and the other `--rlhf_type`s. ms-swift imports a plugin while it reads
its arguments, makes the callbacks after it has loaded the checkpoint, and begins training with them when its optimizer
and `finalize_model_grads_func` are final. LongAct's scalars are logged beside its own.
"""

import importlib.util
from pathlib import Path
from typing import Any

from longact_late import attach, name_tokens, restore

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion.torch_dist import iteration_folder

CONFIG = LongActConfig(ratio=0.30, refresh_interval=1)
"""The run's configuration: edit your copy."""


def begin(trainer: Any) -> LongAct:
    """Attach to a `BaseMegatronTrainer` that is about to train, and go on from the checkpoint that it resumed from."""
    chunks, args = trainer.wrapped_models, trainer.args
    longact = attach(chunks, trainer.optimizer, trainer.opt_param_scheduler, CONFIG)
    if args.mcore_model and not args.finetune and not args.no_load_optim:
        restore(longact, iteration_folder(Path(args.mcore_model)))
    hook = name_tokens(longact, attention_mask_of=lambda inputs, named: named.get("attention_mask"))
    for chunk in chunks:
        chunk.register_forward_pre_hook(hook, with_kwargs=True)
    return longact


if importlib.util.find_spec("swift"):
    from swift.megatron.callbacks import megatron_callbacks_map
    from swift.megatron.callbacks.base import MegatronCallback

    class LongActCallback(MegatronCallback):  # type: ignore[misc]
        """`--callbacks longact`."""

        def on_train_begin(self) -> None:
            """The last thing before the first step."""
            self.longact = begin(self.trainer)

        def on_log(self, logs: dict[str, Any]) -> None:
            """Add LongAct's scalars to what ms-swift logs; collective, as this event is."""
            logs.update({name: value for name, value in self.longact.metrics().items() if value is not None})

    megatron_callbacks_map["longact"] = LongActCallback
