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

import functools
import importlib.util
from pathlib import Path
from typing import Any

from longact_late import attach, name_tokens, restore

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
            self.model.register_forward_pre_hook(name_tokens(longact), with_kwargs=True)
            checkpoint = self.megatron_cfg.checkpoint
            if checkpoint.load and not checkpoint.finetune:
                saved = sorted(Path(checkpoint.load).glob("iter_*/metadata.json"))
                if saved:
                    restore(longact, saved[-1].parent)

    return LongActWorker


def with_lengths(pack: Any) -> Any:
    """NeMo-RL's `_pack_sequences_for_megatron`, leaving the true lengths of sequences beside their padded bounds."""

    @functools.wraps(pack)
    def packed(*rest: Any, **kwargs: Any) -> Any:
        ids, ids_of_rank, packed, bounds, padded_bounds = pack(*rest, **kwargs)
        packed.seq_lens = bounds.diff()
        return ids, ids_of_rank, packed, bounds, padded_bounds

    return packed


if importlib.util.find_spec("nemo_rl"):
    import ray
    from nemo_rl.models.megatron import data
    from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    data._pack_sequences_for_megatron = with_lengths(data._pack_sequences_for_megatron)
    LongActPolicyWorker = ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))(
        with_longact(MegatronPolicyWorkerImpl)
    )
