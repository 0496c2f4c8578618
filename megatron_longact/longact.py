"""LongAct: update only the rows of W_Q and W_K whose channels carry the largest activations.

One optimizer step, on Megatron's own training loop:

    forward and backward   capture    hooks add |activation| of each Q and K channel into fp32 sums
    finalize_model_grads   refresh    sums of all ranks -> saliency -> masks, the same on every rank
                           mask       the frozen rows of `main_grad` become zero
    optimizer.step         freeze      their master values are saved before, and put back after
                           commit     the new saliency, masks and counters become the state

Nothing is committed unless the inner optimizer stepped, so a skipped or repeated pass leaves no trace.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_longact import metrics
from megatron_longact.config import LongActConfig
from megatron_longact.frozen_rows import frozen_rows_by_hf_name
from megatron_longact.imported_masks import read_masks
from megatron_longact.masked_update import FrozenRows, StrictFreeze, gradient_squares, mask_gradients
from megatron_longact.optimizer_shards import chained, derive_quantized_weights, freezes_exactly, resolve_shards
from megatron_longact.qkv_layers import QKVModel, left_out
from megatron_longact.refusals import check_chunks, check_settings, check_tap
from megatron_longact.saliency import SaliencyCapture, few_named
from megatron_longact.selection import QK, is_usable, random_saliency, select_masks, target
from megatron_longact.state import (
    LongActState,
    Step,
    capture_due,
    changed_settings,
    import_due,
    in_warmup,
    refresh_due,
    unusable,
)

logger = logging.getLogger(__name__)

_ATTACHED = "_longact"
"""The optimizer's attribute that knows what is attached to it."""


class LongAct:
    """LongAct on one Megatron model and its optimizer; made by `attach`, ended by `detach`."""

    def __init__(self, model_chunks: Sequence[nn.Module], optimizer: Any, config: LongActConfig) -> None:
        """Use `LongAct.attach`."""
        self.config = config
        self.state = LongActState()
        """After the last successful step."""
        self.step: Step | None = None
        """Since the last refresh; it stays until the next one, for whoever asks what was done."""
        self.model = QKVModel.find(model_chunks)
        self.active = self._active_of(self.state)
        """Channels whose rows the last successful step could move: bool [L, nq] and [L, nk]."""

        self._optimizer = optimizer
        self._said: set[str] = set()
        self._metrics: dict[str, float | None] | None = None
        self._clock = metrics.Stopwatch(self.model.device)
        self._imported = self._read_imported_masks()
        self._saliency = self.model.global_saliency(config)
        self._every_row = self.model.frozen_rows(self.model.channels(False))
        self.freezes = self._strict_freezes()
        """One for each inner optimizer of this rank."""
        self._hooks = ExitStack()
        self._capture = SaliencyCapture(
            self.model,
            config,
            counts=lambda: torch.is_grad_enabled() and capture_due(self.state, config),
            clock=self._clock.part(metrics.CAPTURE),
            warn=self._warn_once,
        )
        self._hooks.callback(self._capture.remove)

    # -- attach and detach -------------------------------------------------------------------------

    @classmethod
    def attach(cls, model_chunks: Sequence[nn.Module], optimizer: Any, config: LongActConfig) -> "LongAct":
        """Attach to a model and its optimizer, on every rank; collective.

        model_chunks: this rank's chunks, wrapped in megatron-core's DistributedDataParallel.
        optimizer: what `get_megatron_optimizer` returned for them.
        Raises `ValueError` for a model, optimizer or setting that LongAct does not work with, by name;
        nothing is attached then.
        """
        if cls.of(optimizer) is not None:
            raise ValueError("LongAct is attached to this optimizer already; call detach() first")
        model_config = get_model_config(model_chunks[0])
        ddp_config = getattr(model_chunks[0], "ddp_config", None)
        check_settings(model_config, getattr(optimizer, "config", None), ddp_config)
        check_chunks(model_chunks)
        check_tap(config, model_config)
        longact = cls(model_chunks, optimizer, config)
        try:
            longact._hook_optimizers()
            longact._hook_finalize(model_chunks)
        except BaseException:
            longact.detach()
            raise
        setattr(optimizer, _ATTACHED, longact)
        longact._hooks.callback(delattr, optimizer, _ATTACHED)
        return longact

    @staticmethod
    def of(optimizer: Any) -> "LongAct | None":
        """The LongAct that is attached to this optimizer, if any."""
        return getattr(optimizer, _ATTACHED, None)

    def detach(self) -> None:
        """Take off every hook and give Megatron its own functions back; may be called twice."""
        self._hooks.close()

    def __enter__(self) -> "LongAct":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _read_imported_masks(self) -> QK | None:
        config, model = self.config, self.model
        if not config.import_mask:
            return None
        masks = read_masks(Path(config.import_mask), model.layout, model.layer_numbers, config.targets)
        return QK(*(mask.to(model.device) for mask in masks))

    def _strict_freezes(self) -> list[StrictFreeze]:
        optimizers = chained(self._optimizer)
        if not optimizers:
            raise ValueError("a rank has no trainable parameter: LongAct cannot tell its successful steps there")
        freezes = []
        for optimizer in optimizers:
            shards = resolve_shards(optimizer, self._every_row, self.config)
            freezes.append(StrictFreeze(shards, optimizer.optimizer, self.config))
        return freezes

    def _hook_optimizers(self) -> None:
        for freeze in self.freezes:
            for handle in (
                freeze.inner.register_step_pre_hook(self._before_step(freeze)),
                freeze.inner.register_step_post_hook(self._after_step(freeze)),
            ):
                self._hooks.callback(handle.remove)

    def _hook_finalize(self, model_chunks: Sequence[nn.Module]) -> None:
        for model_config in {id(c): c for c in map(get_model_config, model_chunks)}.values():
            original = model_config.finalize_model_grads_func
            self._hooks.callback(setattr, model_config, "finalize_model_grads_func", original)
            model_config.finalize_model_grads_func = self._finalize(original or finalize_model_grads)

    # -- one optimizer step ------------------------------------------------------------------------

    def set_tokens(self, token_mask: Tensor, *, rules_applied: bool = False) -> None:
        """Name the tokens of the next micro-batch that count in the statistic: all that attention reads.

        token_mask: [b, s] over the whole sequences, before context-parallel slicing: bool, True where a token counts
        (prompt and response, not padding; a loss mask leaves the prompt out), or numbers: how often each counts.
        rules_applied: `min_context` and `skip_first_tokens` are in it. Call it in the forward step, before the model.
        """
        self._capture.set_tokens(token_mask, rules_applied=rules_applied)

    def _finalize(self, inner: Any) -> Any:
        def finalize_then_mask(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            with self._clock.part(metrics.REFRESH), torch.no_grad():
                self.refresh()
            with self._clock.part(metrics.MASK), torch.no_grad():
                self._mask_gradients()
            return result

        return finalize_then_mask

    def refresh(self) -> None:
        """Begin a step: choose its masks from its forward passes, if a selection is due; collective.

        Called by the wrapped `finalize_model_grads_func`; takes effect for good when the optimizer stepped.
        """
        if self.step is None:
            self._say_how_it_starts()
        pending = self._next_state(self.state)
        active, frozen = self._rows_of(pending)
        self.step = Step(
            pending,
            active,
            frozen,
            waiting=set(self.freezes),
            tokens=self._capture.accumulator.sums[:, -1].clone(),
            squares=torch.zeros(2, device=self.model.device),
        )
        self._capture.reset()
        self._metrics = None

    def _next_state(self, state: LongActState) -> LongActState:
        if import_due(state, self.config):
            return replace(state, masks=self._imported)
        if not refresh_due(state, self.config):
            return state
        saliency = self._measure(state)
        usable, named, real = self._read_verdict(saliency)
        if warning := few_named(named, real):
            self._warn_once(warning, once="few named")
        if not usable:
            self._warn_once(unusable(state, self.config), once="unusable")
            return replace(state, rejected=state.rejected + 1)
        if state.saliency is not None and self.config.smooths_saliency:
            old = self.config.ema
            saliency = QK(*(old * a + (1 - old) * b for a, b in zip(state.saliency, saliency, strict=True)))
        masks = None
        if not in_warmup(state, self.config):
            masks = select_masks(saliency, layout=self.model.layout, config=self.config, before=state.masks)
        return replace(state, refreshes=state.refreshes + 1, saliency=saliency, masks=masks)

    def _measure(self, state: LongActState) -> QK:
        if self.config.select == "random":
            layers = len(self.model.layer_numbers)
            scores = random_saliency(layers, self.model.layout, seed=self.config.seed, refresh=state.refreshes)
            return QK(*(part.to(self.model.device) for part in scores))
        if self.config.select == "weight-norm":
            return self._saliency.from_rows(self.model.weight_norms())
        if self.config.select == "gradient":
            sums = self.model.gradient_sums(shard for freeze in self.freezes for shard in freeze.shards)
            return self._saliency.from_gradients(sums, scale=self._optimizer.get_loss_scale())
        return self._saliency.from_sums(self._capture.accumulator.sums)

    def _read_verdict(self, saliency: QK) -> tuple[bool, float, float]:
        """Whether it is usable, and how many tokens were named, of how many that are no padding, on this rank.

        Here the host waits for the device, once a refresh.
        """
        usable, named, real = torch.cat([is_usable(saliency)[None], self._capture.named_of_real]).tolist()
        return bool(usable), named, real

    def _rows_of(self, pending: LongActState) -> tuple[QK, FrozenRows]:
        """The channels that a step may move, and this rank's other rows; those of the step before while they hold."""
        last, masks = self.step, pending.masks
        same_warmup = last is not None and in_warmup(last.pending, self.config) == in_warmup(pending, self.config)
        if last is not None and last.pending.masks is masks and (masks is not None or same_warmup):
            return last.active, last.frozen
        active = self._active_of(pending)
        return active, self.model.frozen_rows(active)

    def _active_of(self, state: LongActState) -> QK:
        """What a step may move; while there are no masks everything in warm-up, else nothing that is a target."""
        if state.masks is not None:
            return state.masks
        channels = target(self.model.channels(in_warmup(state, self.config)), self.config)
        return QK(*(part.to(self.model.device) for part in channels))

    def _mask_gradients(self) -> None:
        assert self.step is not None
        rows = (self.step.frozen, self._every_row)
        for freeze in self.freezes:
            self.step.squares += gradient_squares(self.model.counted(freeze.shards), rows, self.model.device)
        mask_gradients(self.step.frozen)

    def _before_step(self, freeze: StrictFreeze) -> Any:
        def before(*_: Any) -> None:
            step = self.step
            if self._capture.training_forwards and not (step and step.waiting):
                raise RuntimeError(
                    "the optimizer steps on gradients that LongAct did not see: config.finalize_model_grads_func was "
                    "replaced after LongAct.attach, or not called; attach after it is set"
                )
            if step and freeze in step.waiting:  # else the dummy step of a checkpoint load
                with self._clock.part(metrics.FREEZE), torch.no_grad():
                    freeze.before_step(step.frozen)

        return before

    def _after_step(self, freeze: StrictFreeze) -> Any:
        def after(*_: Any) -> None:
            step = self.step
            if step and freeze in step.waiting:
                with self._clock.part(metrics.RESTORE), torch.no_grad():
                    freeze.after_step(step.frozen)
                if len(step.waiting) == len(self.freezes):
                    self._commit(step)
                step.waiting.discard(freeze)

        return after

    def _commit(self, step: Step) -> None:
        """The first inner optimizer stepped, so the others will: what was pending becomes the state."""
        exact, before = freezes_exactly(self._optimizer, self.config), self.state.masks
        self.state = step.pending.after_update(step.active, exact=exact, before=before)
        step.pending = replace(step.pending, history=self.state.history)  # so that one of them is held, not two
        self.active = step.active
        self._metrics = None

    # -- what it knows -----------------------------------------------------------------------------

    @property
    def masks(self) -> dict[int, dict[str, Tensor]]:
        """Rows that are updated, by global layer number: {"q": bool [nq], "k": bool [nk]}."""
        return self._by_layer(self.state.masks)

    @property
    def saliency(self) -> dict[int, dict[str, Tensor]]:
        """Smoothed saliency, by global layer number: {"q": fp32 [nq], "k": fp32 [nk]}."""
        return self._by_layer(self.state.saliency)

    def _by_layer(self, pair: QK | None) -> dict[int, dict[str, Tensor]]:
        if pair is None:
            return {}
        return {n: {"q": pair.q[i], "k": pair.k[i]} for i, n in enumerate(self.model.layer_numbers)}

    def frozen_rows_by_hf_name(self, *, since: int = 0) -> dict[str, Tensor]:
        """Rows that no update after `since` could move, by Hugging Face's tensors; not collective: `frozen_rows`."""
        return frozen_rows_by_hf_name(self.state, self.model, since=since)

    def metrics(self) -> dict[str, float | None]:
        """Scalars of the last step, named as in `megatron_longact.metrics`; collective.

        Alike on all ranks, but for `longact/time_s`: this rank's time in LongAct since the step before was asked
        about. Asked again before the next step, the answer is the same. Here alone the host waits for them. After a
        step that Megatron skipped, the share of the gradient is that step's, all else that of the step before.
        """
        if self._metrics is None:
            squares, model = self.step.squares if self.step else None, self.model
            squares = metrics.of_all_ranks(squares, model.groups, model.device)
            self._metrics = {
                **metrics.read(active=self.active, masks=self.state.masks, history=self.state.history, squares=squares),
                metrics.TIME: self._clock.read(),
                metrics.REFRESHES: self.state.refreshes,
                metrics.REJECTED_REFRESHES: self.state.rejected,
            }
        return self._metrics

    def time_s(self) -> float:
        """Seconds of this rank's time in LongAct since it was attached; waits for the device."""
        return self._clock.total()

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: plain values and host tensors, alike on all ranks.

        Keyed by global layer and channel, so it loads at any other parallel layout.
        """
        return {**self._shape(), "config": asdict(self.config), **self.state.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`; where weights are kept in FP8 they are quantised anew from their masters.

        Raises `ValueError` for another model shape, and for another configuration unless
        `on_mismatch="use-flags"`; the message names what differs.
        """
        for name, value in self._shape().items():
            if state_dict[name] != value:
                raise ValueError(f"the checkpoint's LongAct state has {name} {state_dict[name]}, this model {value}")
        differ = changed_settings(state_dict["config"], self.config)
        self.state, self.step = LongActState.from_state_dict(state_dict, self.model.device), None
        if differ:
            _log(f"LongAct goes on with the flags given now: {differ}")
            self.state = self.state.to_go_on(state_dict["config"], self.config)
        self.active = self._active_of(self.state)
        self._metrics = None
        derive_quantized_weights(self._optimizer)
        self._capture.reset()

    def _shape(self) -> dict[str, Any]:
        return {"layout": self.model.layout.saved(), "layer_numbers": list(self.model.layer_numbers)}

    def _say_how_it_starts(self) -> None:
        updates, without = self.state.updates, self.model.without
        if without:
            _log(left_out(without, of=len(without) + len(self.model.layer_numbers)))
        _log(f"LongAct goes on at update {updates}" if updates else f"LongAct starts fresh: {self.config}")

    def _warn_once(self, message: str, *, once: str = "") -> None:
        """Warn on rank 0, once for each `once`, or message."""
        if (once or message) not in self._said:
            self._said.add(once or message)
            _log(message, level=logging.WARNING)


def _log(message: str, *, level: int = logging.INFO) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.log(level, message)
