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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_longact import metrics
from megatron_longact.config import LongActConfig
from megatron_longact.imported_masks import read_masks
from megatron_longact.masked_update import FrozenRows, StrictFreeze, gradient_squares, mask_gradients
from megatron_longact.optimizer_shards import chained, derive_quantized_weights, resolve_shards
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.refusals import check_chunks, check_settings, check_tap
from megatron_longact.saliency import SaliencyCapture
from megatron_longact.selection import QK, GlobalSaliency, random_saliency, select_masks
from megatron_longact.state import LongActState, changed_settings

logger = logging.getLogger(__name__)

_ATTACHED: "WeakKeyDictionary[Any, LongAct]" = WeakKeyDictionary()


class LongAct:
    """LongAct on one Megatron model and its optimizer; made by `attach`, ended by `detach`."""

    def __init__(self, model_chunks: Sequence[nn.Module], optimizer: Any, config: LongActConfig) -> None:
        """Use `LongAct.attach`."""
        self.config = config
        self._optimizer = optimizer
        self._handles: list[Any] = []
        self._finalize_functions: list[tuple[Any, Any]] = []
        self._state = self._pending = LongActState()
        self._frozen: FrozenRows = {}
        self._frozen_for: QK | bool | None = None
        self._unstepped: set[int] = set()
        self._jaccard: float | None = None
        self._gradient_squares: Tensor | None = None
        self._warned: set[str] = set()
        self._started = False
        self._metrics_of_step: dict[str, float | None] | None = None

        self._model = QKVModel.find(model_chunks)
        self._clock = metrics.Stopwatch(self._model.device)
        self._imported = self._read_imported_masks()
        self._saliency = GlobalSaliency(
            self._model.groups,
            self._model.layout,
            config,
            layer_numbers=self._model.layer_numbers,
            local_layers=[layer.layer_number for layer in self._model.layers],
        )
        self._every_row = self._model.frozen_rows(self._model.channels(False))
        self._freezes = self._strict_freezes()
        self._capture = SaliencyCapture(
            self._model, config, clock=self._clock.part(metrics.CAPTURE), warn=self._warn_once
        )
        self._capture.enabled = self._capture_next_step()

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
        longact._hook_optimizers()
        longact._hook_finalize(model_chunks)
        _ATTACHED[optimizer] = longact
        return longact

    @staticmethod
    def of(optimizer: Any) -> "LongAct | None":
        """The LongAct that is attached to this optimizer, if any."""
        return _ATTACHED.get(optimizer)

    def detach(self) -> None:
        """Take off every hook and give Megatron its own functions back; may be called twice."""
        self._capture.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for model_config, original in self._finalize_functions:
            model_config.finalize_model_grads_func = original
        self._finalize_functions.clear()
        _ATTACHED.pop(self._optimizer, None)

    def __enter__(self) -> "LongAct":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _read_imported_masks(self) -> QK | None:
        config, model = self.config, self._model
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
        for freeze in self._freezes:
            self._handles.append(freeze.inner.register_step_pre_hook(self._before_step(freeze)))
            self._handles.append(freeze.inner.register_step_post_hook(self._after_step(freeze)))

    def _hook_finalize(self, model_chunks: Sequence[nn.Module]) -> None:
        for model_config in {id(c): c for c in map(get_model_config, model_chunks)}.values():
            original = model_config.finalize_model_grads_func
            self._finalize_functions.append((model_config, original))
            model_config.finalize_model_grads_func = self._finalize(original or finalize_model_grads)

    # -- one optimizer step ------------------------------------------------------------------------

    def set_tokens(self, token_mask: Tensor) -> None:
        """Name the tokens of the next micro-batch that count in the statistic.

        token_mask: bool [b, s], True where a token counts, over the whole sequences, that is before
        context-parallel slicing. Call it in the forward step, just before the model.
        """
        self._capture.set_tokens(token_mask)

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
        """Choose the masks of this step from its forward passes, if a selection is due; collective.

        Called by the wrapped `finalize_model_grads_func`; takes effect for good when the optimizer stepped.
        """
        state = self._state
        if not self._started:
            self._started = True
            _log_once(
                f"LongAct goes on at update {state.updates}"
                if state.updates
                else f"LongAct starts fresh: {self.config}"
            )
        if self._refresh_due(state):
            self._pending = self._refreshed(state)
        elif self._import_due(state):
            self._pending = replace(state, masks=self._imported)
        else:
            self._pending = state
        self._capture.accumulator.reset()
        self._capture.training_forwards = 0
        self._metrics_of_step = None
        self._unstepped = {id(freeze) for freeze in self._freezes}

    def _in_warmup(self, state: LongActState) -> bool:
        return state.updates < self.config.warmup_steps

    def _refresh_due(self, state: LongActState) -> bool:
        interval = self.config.refresh_interval
        if self._in_warmup(state):
            return self.config.smooths_saliency and state.updates % max(interval, 1) == 0
        if state.masks is None:
            return self._imported is None
        return interval > 0 and (state.updates - self.config.warmup_steps) % interval == 0

    def _import_due(self, state: LongActState) -> bool:
        return self._imported is not None and state.masks is None and not self._in_warmup(state)

    def _capture_next_step(self) -> bool:
        return self.config.reads_activations and self._refresh_due(self._state)

    def _refreshed(self, state: LongActState) -> LongActState:
        saliency, usable = self._measure(state)
        if not usable:
            return replace(state, rejected=state.rejected + 1)
        if state.saliency is not None and self.config.smooths_saliency:
            old = self.config.ema
            saliency = QK(*(old * a + (1 - old) * b for a, b in zip(state.saliency, saliency, strict=True)))
        masks = None
        if not self._in_warmup(state):
            masks = self._target(select_masks(saliency, layout=self._model.layout, config=self.config))
        return replace(state, refreshes=state.refreshes + 1, saliency=saliency, masks=masks)

    def _measure(self, state: LongActState) -> tuple[QK, bool]:
        if self.config.select == "random":
            layers = len(self._model.layer_numbers)
            return random_saliency(layers, self._model.layout, seed=self.config.seed, refresh=state.refreshes), True
        if self.config.select == "weight-norm":
            saliency = self._saliency.from_rows(self._model.weight_norms())
            return saliency, all(bool(torch.isfinite(scores).all()) for scores in saliency)
        return self._saliency.from_sums(self._capture.accumulator.sums)

    def _target(self, masks: QK) -> QK:
        """All True for a projection that is not a target."""
        targets = self.config.targets
        return QK(
            masks.q if "q" in targets else torch.ones_like(masks.q),
            masks.k if "k" in targets else torch.ones_like(masks.k),
        )

    def _mask_gradients(self) -> None:
        self._frozen = self._frozen_rows()
        rows = (self._frozen, self._every_row)
        self._gradient_squares = sum(
            (gradient_squares(freeze.shards, rows, self._model.device) for freeze in self._freezes),
            start=torch.zeros(len(rows), device=self._model.device),
        )
        mask_gradients(self._frozen)

    def _frozen_rows(self) -> FrozenRows:
        """The frozen local rows of every parameter, for the pending masks; cached while they stay."""
        masks = self._pending.masks
        wanted = self._in_warmup(self._pending) if masks is None else masks
        if wanted is self._frozen_for:
            return self._frozen
        self._frozen_for = wanted
        return self._model.frozen_rows(masks or self._target(self._model.channels(wanted is True)))

    def _before_step(self, freeze: StrictFreeze) -> Any:
        def before(*_: Any) -> None:
            if self._capture.training_forwards and not self._unstepped:
                raise RuntimeError(
                    "the optimizer steps on gradients that LongAct did not see: config.finalize_model_grads_func was "
                    "replaced after LongAct.attach, or not called; attach after it is set"
                )
            if id(freeze) in self._unstepped:  # not the dummy step of a checkpoint load
                with self._clock.part(metrics.FREEZE), torch.no_grad():
                    freeze.before_step(self._frozen)

        return before

    def _after_step(self, freeze: StrictFreeze) -> Any:
        def after(*_: Any) -> None:
            if id(freeze) in self._unstepped:
                with self._clock.part(metrics.RESTORE), torch.no_grad():
                    freeze.after_step(self._frozen)
                    if len(self._unstepped) == len(self._freezes):
                        self._commit()
                self._unstepped.discard(id(freeze))

        return after

    def _commit(self) -> None:
        """The first inner optimizer stepped, so the others will: what was pending becomes the state."""
        old, new = self._state.masks, self._pending.masks
        self._jaccard = None if old is None or new is None else metrics.jaccard(new, old)
        self._state = replace(self._pending, updates=self._pending.updates + 1)
        self._capture.enabled = self._capture_next_step()

    # -- what it knows -----------------------------------------------------------------------------

    @property
    def state(self) -> LongActState:
        """The state after the last successful step."""
        return self._state

    @property
    def masks(self) -> dict[int, dict[str, Tensor]]:
        """Rows that are updated, by global layer number: {"q": bool [np * hn], "k": bool [ng * hn]}."""
        return self._by_layer(self._state.masks)

    @property
    def saliency(self) -> dict[int, dict[str, Tensor]]:
        """Smoothed saliency, by global layer number: {"q": fp32 [np * hn], "k": fp32 [ng * hn]}."""
        return self._by_layer(self._state.saliency)

    def _by_layer(self, pair: QK | None) -> dict[int, dict[str, Tensor]]:
        if pair is None:
            return {}
        return {n: {"q": pair.q[i], "k": pair.k[i]} for i, n in enumerate(self._model.layer_numbers)}

    def metrics(self) -> dict[str, float | None]:
        """Scalars of the last step, named as in `megatron_longact.metrics`; collective, alike on all ranks.

        `longact/time_s` is this rank's time in LongAct since the step before was asked about. Asked again
        before the next step, the answer is the same.
        """
        if self._metrics_of_step is None:
            self._metrics_of_step = self._measure_metrics()
        return self._metrics_of_step

    def _measure_metrics(self) -> dict[str, float | None]:
        masks, warmup = self._state.masks, self._state.updates <= self.config.warmup_steps
        fractions = [1.0 if warmup else 0.0] * 2 if masks is None else [metrics.active_fraction(m) for m in masks]
        return {
            metrics.ACTIVE_FRACTION_Q: fractions[0],
            metrics.ACTIVE_FRACTION_K: fractions[1],
            metrics.MASK_JACCARD: self._jaccard,
            metrics.MASKED_GRAD_NORM_SHARE: self._masked_share(),
            metrics.TIME: self._clock.read(),
            metrics.REFRESHES: self._state.refreshes,
            metrics.REJECTED_REFRESHES: self._state.rejected,
        }

    def _masked_share(self) -> float | None:
        """Norm of the gradient that was masked, over the norm of the whole gradient of Q and K."""
        if self._gradient_squares is None:
            return None
        squares = self._gradient_squares.clone()
        groups = self._model.groups
        for group in (groups.tp, groups.dp_cp, groups.pp):
            dist.all_reduce(squares, group=group)
        masked, total = squares.tolist()
        return (masked / total) ** 0.5 if total > 0 else None

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: plain values and host tensors, alike on all ranks.

        Keyed by global layer and channel, so it loads at any other parallel layout.
        """
        return {**self._shape(), "config": asdict(self.config), **self._state.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`; where weights are kept in FP8 they are quantised anew from their masters.

        Raises `ValueError` for another model shape, and for another configuration unless
        `on_mismatch="use-flags"`; the message names what differs.
        """
        for name, value in self._shape().items():
            if state_dict[name] != value:
                raise ValueError(f"the checkpoint's LongAct state has {name} {state_dict[name]}, this model {value}")
        differ = changed_settings(state_dict["config"], self.config)
        if differ:
            _log_once(f"LongAct goes on with the flags given now: {differ}")
        self._state = self._pending = LongActState.from_state_dict(state_dict, self._model.device)
        derive_quantized_weights(self._optimizer)
        self._unstepped, self._frozen_for = set(), None
        self._capture.accumulator.reset()
        self._capture.enabled = self._capture_next_step()

    def _shape(self) -> dict[str, Any]:
        return {"layout": asdict(self._model.layout), "layer_numbers": list(self._model.layer_numbers)}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log_once(message, level=logging.WARNING)


def _log_once(message: str, *, level: int = logging.INFO) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.log(level, message)
