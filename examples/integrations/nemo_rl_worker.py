"""LongAct in NeMo-RL, by a worker extension class.

    # in the main process, where the policy is made
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    name = "nemo_rl_worker.LongActPolicyWorker"
    ACTOR_ENVIRONMENT_REGISTRY[name] = ACTOR_ENVIRONMENT_REGISTRY[
        "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
    ]
    policy = Policy(..., worker_extension_cls_fqn=name)

A `pre_wrap_hook` would be too early: it is given the model before Megatron's DDP and the optimizer exist.
"""

import importlib.util
from pathlib import Path
from typing import Any

from longact_late import attach, restore

from megatron_longact import LongActConfig

CONFIG = LongActConfig(ratio=0.30, refresh_interval=1)
"""The run's configuration: edit your copy."""


def with_longact(worker_class: Any) -> Any:
    """A subclass of NeMo-RL's `MegatronPolicyWorkerImpl` that attaches LongAct when everything else is set up."""

    class LongActWorker(worker_class):  # type: ignore[misc]
        def __init__(self, *rest: Any, **kwargs: Any) -> None:
            super().__init__(*rest, **kwargs)
            if self.optimizer is None:
                return
            longact = attach([self.model], self.optimizer, self.scheduler, CONFIG)
            checkpoint = self.megatron_cfg.checkpoint
            if checkpoint.load and not checkpoint.finetune:
                saved = sorted(Path(checkpoint.load).glob("iter_*/metadata.json"))
                if saved:
                    restore(longact, saved[-1].parent)

    return LongActWorker


if importlib.util.find_spec("nemo_rl"):
    import ray
    from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    LongActPolicyWorker = ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))(
        with_longact(MegatronPolicyWorkerImpl)
    )
