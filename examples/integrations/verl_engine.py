"""LongAct in verl 0.9, by `model.external_lib`.

    PYTHONPATH=examples/integrations:$PYTHONPATH python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.model.external_lib=verl_engine \
        actor_rollout_ref.actor.optim.use_checkpoint_opt_param_scheduler=True

verl imports this module in every worker, before it builds an engine. Without the second setting it saves LongAct's
state and does not load it.
"""

import importlib.util
from typing import Any

from longact_late import attach

from megatron_longact import LongActConfig

CONFIG = LongActConfig(ratio=0.30, refresh_interval=1)
"""The run's configuration: edit your copy."""


def add_longact(engine_class: Any) -> None:
    """Let every engine of a class (verl's `MegatronEngine`) attach LongAct when it has built optimizer and scheduler.

    The scheduler is the last thing that verl builds before it makes its checkpoint manager. Critics stay as they are.
    """
    build = engine_class._build_lr_scheduler

    def _build_lr_scheduler(self: Any) -> Any:
        scheduler = build(self)
        if not self.is_value_model:
            attach(self.module, self.optimizer, scheduler, CONFIG)
        return scheduler

    engine_class._build_lr_scheduler = _build_lr_scheduler


if importlib.util.find_spec("verl"):
    from verl.workers.engine.megatron.transformer_impl import MegatronEngine

    add_longact(MegatronEngine)
