"""Optimizer states in checkpoints, with torch's own Adam and SGD in place of Transformer Engine's or Apex's."""

from __future__ import annotations

import functools
from typing import Any

import torch


def mend_optimizer_checkpoints() -> None:
    """Wrap what saves and loads the optimizers' states."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for cls in (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer):
        _make_state_before(cls, "sharded_state_dict")
    for cls in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        _step_zero_before(cls, "load_state_dict")
    _keep_step_within(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    _own_step_after(DistributedOptimizer, "load_state_dict")


def _make_state_before(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer:
            _make_state(self.optimizer)
            self.init_state_fn = self.init_state_fn or (lambda *args, **kwargs: None)
        return method(self, *args, **kwargs)

    setattr(cls, name, call)


def _make_state(inner: torch.optim.Optimizer) -> None:
    """Give every parameter of torch's Adam(W) or SGD the state that its first step would begin with.

    Others are left alone: to Megatron a state with an entry in it, were it empty, is one that need not be allocated.
    """
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) and "step" not in state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            if isinstance(inner, torch.optim.SGD) and group["momentum"] and "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _step_zero_before(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("optimizer", state_dict)["state"]
        adam = [state for state in states.values() if isinstance(state, dict) and "exp_avg" in state]
        if "common_step" not in states and any("step" not in state for state in adam):
            states["common_step"] = torch.tensor(0.0, dtype=torch.float32)
        method(self, state_dict)

    setattr(cls, name, call)


def _keep_step_within(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        with torch.no_grad():
            method(self, model_param, tensors | {k: state[k] for k in ("step",) if k in state})

    setattr(cls, name, call)


def _own_step_after(cls: type, name: str) -> None:
    method = getattr(cls, name)

    @functools.wraps(method)
    def call(self: Any, state_dict: dict[str, Any]) -> None:
        method(self, state_dict)
        for state in [] if self.is_stub_optimizer else self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    setattr(cls, name, call)
