"""What test_integrations runs on each rank: the files of examples/integrations, called as their trainers call them."""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from tests.launch import ROOT
from tests.models import Built, ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.runs import cpu

sys.path.append(str(ROOT / "examples" / "integrations"))
import longact_late  # noqa: F401 (for test_integrations: the folder is on the path here)
import nemo_rl_worker
import skyrl_worker
import slime_hooks
import swift_plugin  # noqa: F401 (that it can be imported)
import verl_engine

SPEC, OPTIMIZER = ModelSpec(dtype="bf16"), OptimizerSpec(distributed=True)
CONFIG = LongActConfig(ratio=0.25, ema=0.5, refresh_interval=2)
PADDED_TO, STEPS = 32, 2


def scheduler_of(optimizer: Any) -> OptimizerParamScheduler:
    """Megatron's own scheduler at a constant rate."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-2,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def save(folder: Path, scheduler: OptimizerParamScheduler, *, tracker: bool = True) -> None:
    """The scheduler's state as Megatron's `save_checkpoint` keeps it: plain values in a torch_dist checkpoint."""
    path = folder / "iter_0000002"
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
        if tracker:
            (folder / "latest_checkpointed_iteration.txt").write_text("2")
    torch.distributed.barrier()
    dist_checkpointing.save({"opt_param_scheduler": scheduler.state_dict()}, str(path))


def slime_batch(seed: int) -> dict[str, Any]:
    """A micro-batch as slime's `get_batch` makes it: two sequences and zeros in one row, the zeros a third sequence."""
    lengths = [9 + seed % 3, 14]
    tokens = random_tokens(1, sum(lengths), seed=seed)[0, :-1].clamp(min=1)
    bounds = torch.tensor([0, lengths[0], sum(lengths), PADDED_TO], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=14, max_seqlen_kv=14
    )
    return {
        "input_ids": torch.nn.functional.pad(tokens, (0, PADDED_TO - len(tokens)))[None],
        "position_ids": None,
        "attention_mask": None,
        "labels": None,
        "packed_seq_params": packed,
        "loss_mask": torch.ones(1, PADDED_TO),
    }


def slime_step(built: Built, batches: list[dict[str, Any]], hook: Any) -> None:
    """The order of slime's `train_one_step`, with its hook where it calls it."""
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    hook()

    def forward_step(data: Any, model: Any) -> Any:
        batch = next(data)
        logits = model(**batch)
        return logits, lambda output: (output.float().logsumexp(-1).mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=built.chunks[0],
        num_microbatches=len(batches),
        seq_length=PADDED_TO,
        micro_batch_size=1,
        forward_only=False,
    )
    assert built.optimizer.step()[0]


def masks_and_weights(built: Built) -> dict[str, Any]:
    """What a run came to, in a form that can leave the rank."""
    longact = LongAct.of(built.optimizer)
    assert longact is not None
    return {"masks": cpu(longact.masks), "saliency": cpu(longact.saliency), "weights": full_weights(built)}


def slime(*, folder: Path, rollouts: int, resume: bool, hooks: bool = True) -> dict[str, Any]:
    """Rollouts of two steps through slime's hooks, saved after the first; without `hooks`: attached once, by hand."""
    torch.use_deterministic_algorithms(True)
    built = build(SPEC, OPTIMIZER)
    scheduler = scheduler_of(built.optimizer)
    settings = {"longact_ratio": CONFIG.ratio, "longact_ema": CONFIG.ema, "longact_refresh_interval": 2}
    args = Namespace(load=str(folder), finetune=False, no_load_optim=False, ckpt_step=None, **settings)
    slime_hooks.check_settings(args)
    if not hooks:
        longact = LongAct.attach(built.chunks, built.optimizer, CONFIG)
        built.chunks[0].register_forward_pre_hook(
            lambda chunk, inputs, named: longact.set_tokens(named["input_ids"] != 0), with_kwargs=True
        )
    for rollout in range(rollouts):
        if hooks:
            built.config.finalize_model_grads_func = finalize_model_grads  # slime's `train`, each time
        for step in range(STEPS):
            batches = [slime_batch(seed) for seed in range(2)]

            def hook(rollout: int = rollout, step: int = step) -> None:
                if hooks:
                    slime_hooks.before_train_step(args, rollout, step, built.chunks, built.optimizer, scheduler)

            before = full_weights(built)
            slime_step(built, batches, hook)
            scheduler.step(increment=1)
        if rollout == 0 and not resume and hooks:
            save(folder, scheduler)
    return {**masks_and_weights(built), "before": before, "state": LongAct.of(built.optimizer).state_dict()}


class VerlEngine:
    """What `add_longact` needs of verl's MegatronEngine: its attributes, and the method that it wraps."""

    def __init__(self, *, is_value_model: bool) -> None:
        self.is_value_model = is_value_model
        self.built = build(SPEC, OPTIMIZER)
        self.module, self.optimizer = self.built.chunks, self.built.optimizer
        self.lr_scheduler = self._build_lr_scheduler()

    def _build_lr_scheduler(self) -> OptimizerParamScheduler:
        return scheduler_of(self.optimizer)


def frozen_rows_changed(built: Built) -> tuple[int, int]:
    """Train two steps; frozen rows of the masters, and how many of them changed."""
    longact = LongAct.of(built.optimizer)
    assert longact is not None
    frozen = changed = 0
    for seed in range(2):
        before = {id(s): s.inner_parameter.detach().clone() for f in longact.freezes for s in f.shards}
        assert train_step(
            built,
            random_tokens(8, 16, seed=seed),
            before_forward=lambda inputs: longact.set_tokens(torch.ones_like(inputs, dtype=torch.bool)),
        )[0]
        for shard in (s for f in longact.freezes for s in f.shards):
            new = shard.parts(shard.inner_parameter.detach(), longact.step.frozen)
            for (old, rows), (now, _) in zip(shard.parts(before[id(shard)], longact.step.frozen), new, strict=True):
                frozen += old[rows].numel()
                changed += int((old[rows] != now[rows]).sum())
    return frozen, changed


def verl() -> dict[str, Any]:
    """An actor's engine, another that loads what it saved, and a critic's."""

    class Engine(VerlEngine):
        pass

    verl_engine.add_longact(Engine)
    actor, critic, resumed = Engine(is_value_model=False), Engine(is_value_model=True), Engine(is_value_model=False)
    rows = frozen_rows_changed(actor.built)
    saved = actor.lr_scheduler.state_dict()
    resumed.lr_scheduler.load_state_dict(saved)
    return {
        "rows": rows,
        "critic": LongAct.of(critic.optimizer),
        "state": saved["longact"],
        "resumed": LongAct.of(resumed.optimizer).state_dict(),
    }


class NemoRLWorker:
    """What `with_longact` needs of NeMo-RL's MegatronPolicyWorkerImpl: what its constructor leaves behind."""

    def __init__(self, config: dict[str, Any], *, weights_path: str | None) -> None:
        self.built = build(SPEC, OPTIMIZER)
        [self.model], self.optimizer = self.built.chunks, self.built.optimizer
        self.scheduler = scheduler_of(self.optimizer)
        self.megatron_cfg = SimpleNamespace(checkpoint=SimpleNamespace(load=weights_path, finetune=False))


def nemo_rl(*, folder: Path) -> dict[str, Any]:
    """A worker, and one that goes on from what the first saved."""
    worker_class = nemo_rl_worker.with_longact(NemoRLWorker)
    worker = worker_class({}, weights_path=None)
    rows = frozen_rows_changed(worker.built)
    save(folder, worker.scheduler, tracker=False)
    resumed = worker_class({}, weights_path=str(folder))
    return {
        "rows": rows,
        "state": LongAct.of(worker.optimizer).state_dict(),
        "resumed": LongAct.of(resumed.optimizer).state_dict(),
    }


class SkyRLWorker:
    """What `attach_to` needs of SkyRL's MegatronPolicyWorkerBase, and of the wrapper that defers the reduction."""

    def init_model(self) -> None:
        self.built = build(SPEC, OPTIMIZER)
        self.actor_module, self.optimizer = self.built.chunks, self.built.optimizer
        self.scheduler = scheduler_of(self.optimizer)
        self.noted = self.reduced = 0
        self.model = SimpleNamespace(run_pending_grad_sync=self.reduce)
        self.built.config.finalize_model_grads_func = self.take_note

    def take_note(self, model: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        self.noted += 1

    def reduce(self) -> None:
        self.reduced += 1
        finalize_model_grads(self.actor_module, None)

    def forward_backward(self, seed: int) -> int:
        """One call with one micro-batch; its tokens that are no padding."""
        batch = slime_batch(seed)
        packed = batch["packed_seq_params"]
        packed.seq_lens = packed.cu_seqlens_q.diff()[:2]

        def forward_step(data: Any, model: Any) -> Any:
            logits = model(batch["input_ids"], None, None, packed_seq_params=packed)
            return logits, lambda output: (output.float().logsumexp(-1).mean(), {})

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([]),
            model=self.actor_module,
            num_microbatches=1,
            seq_length=PADDED_TO,
            micro_batch_size=1,
            forward_only=False,
        )
        return int(packed.seq_lens.sum())


def skyrl() -> None:
    """One step of two calls, masked where the gradients are reduced; then without LongAct."""
    worker = skyrl_worker.with_longact(SkyRLWorker)()
    worker.init_model()
    longact = LongAct.of(worker.optimizer)
    assert longact is not None
    tokens = sum(worker.forward_backward(seed) for seed in range(2))
    assert longact.step is None
    worker.model.run_pending_grad_sync()
    assert longact.step.tokens.eq(tokens).all()
    assert all(not p.main_grad[rows.host].any() for p, rows in longact.step.frozen.items())
    assert worker.optimizer.step()[0]
    longact.detach()
    worker.forward_backward(seed=2)
    worker.model.run_pending_grad_sync()
    assert (worker.noted, worker.reduced) == (3, 2)


def tensors_equal(a: Any, b: Any) -> bool:
    """Equal structure, values and bits."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[key], b[key]) for key in a)
    return bool(a == b)
