"""LongAct in SkyRL 0.4, by a policy worker in place of its own.

    export SKYRL_PYTHONPATH_EXPORT=true PYTHONPATH=examples/integrations:$PYTHONPATH
    python -m skyrl.train.entrypoints.main_base trainer.strategy=megatron ... \
        trainer.override_entrypoint=skyrl_worker

The first line lets SkyRL's workers, which are other processes, find this file. An entrypoint of your own calls `use()`
before its trainer builds its models, in the process that does.
"""

import functools
import importlib.util
import sys
from typing import Any

from longact_late import attach, name_tokens

from megatron_longact import LongAct, LongActConfig

CONFIG = LongActConfig(ratio=0.30, refresh_interval=1)
"""The run's configuration: edit your copy."""


def attach_to(worker: Any) -> LongAct:
    """Attach to a `MegatronPolicyWorkerBase` whose `init_model` is through; collective.

    A step may have several `forward_backward` calls. Megatron calls SkyRL's finalize function at the end of each, which
    only takes note; gradients are reduced once a step, by `run_pending_grad_sync`, and that is where LongAct selects.
    """
    from megatron.core.utils import get_model_config

    wrapper, config = worker.model, get_model_config(worker.actor_module[0])
    take_note, reduce = config.finalize_model_grads_func, wrapper.run_pending_grad_sync
    config.finalize_model_grads_func = lambda *args, **kwargs: take_note(*args, **kwargs) if args else reduce()
    longact = attach(worker.actor_module, worker.optimizer, worker.scheduler, CONFIG)
    reduce_and_mask, config.finalize_model_grads_func = config.finalize_model_grads_func, take_note

    def run_pending_grad_sync() -> None:
        (reduce if LongAct.of(worker.optimizer) is None else reduce_and_mask)()

    wrapper.run_pending_grad_sync = run_pending_grad_sync
    hook = name_tokens(longact, attention_mask_of=lambda inputs, named: inputs[2])  # tokens, positions, [b, 1, 1, s]
    for chunk in worker.actor_module:
        chunk.register_forward_pre_hook(hook, with_kwargs=True)
    return longact


def with_lengths(preprocess: Any) -> Any:
    """SkyRL's `preprocess_packed_seqs`, leaving the true lengths of its sequences beside their padded bounds."""

    @functools.wraps(preprocess)
    def packed(input_ids: Any, attention_mask: Any, *rest: Any, sub_seq_lengths: Any = None, **kwargs: Any) -> Any:
        ids, packed = preprocess(input_ids, attention_mask, *rest, sub_seq_lengths=sub_seq_lengths, **kwargs)
        if sub_seq_lengths is None:
            packed.seq_lens = attention_mask.sum(dim=1)
        else:
            packed.seq_lens = packed.cu_seqlens_q.new_tensor([n for row in sub_seq_lengths for n in row])
        return ids, packed

    return packed


def with_longact(worker_class: Any) -> Any:
    """A subclass of SkyRL's `MegatronPolicyWorkerBase` that attaches LongAct when its model is there."""

    class LongActWorker(worker_class):  # type: ignore[misc]
        def init_model(self, *rest: Any, **kwargs: Any) -> None:
            super().init_model(*rest, **kwargs)
            if self.optimizer is not None:
                attach_to(self)

    return LongActWorker


if importlib.util.find_spec("skyrl"):
    import ray
    from skyrl.backends.skyrl_train.workers.megatron import megatron_model_wrapper, megatron_worker

    megatron_model_wrapper.preprocess_packed_seqs = with_lengths(megatron_model_wrapper.preprocess_packed_seqs)
    LongActPolicyWorker = with_longact(megatron_worker.MegatronPolicyWorkerBase)

    def use() -> None:
        """Let SkyRL's trainers that build their models in this process from now on build these workers."""
        megatron_worker.PolicyWorker = ray.remote(num_gpus=1)(LongActPolicyWorker)

    def run(cfg: Any) -> None:
        """What SkyRL's `skyrl_entrypoint` does, in a process of its own, with these workers."""
        from skyrl.train.entrypoints.main_base import BasePPOExp

        use()
        BasePPOExp(cfg).run()

    def main() -> None:
        """`trainer.override_entrypoint=skyrl_worker`: SkyRL's own `main`, with these workers."""
        from skyrl.train.entrypoints import main_base

        sys.argv[:] = [flag for flag in sys.argv if not flag.startswith("trainer.override_entrypoint=")]
        main_base.skyrl_entrypoint = ray.remote(num_cpus=1)(run)
        main_base.main()
