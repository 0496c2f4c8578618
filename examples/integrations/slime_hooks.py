"""LongAct in slime, by two of its hooks.

    # longact.yaml
    longact_ratio: 0.30
    longact_refresh_interval: 1

    PYTHONPATH=examples/integrations:$PYTHONPATH python train.py ... --custom-config-path longact.yaml \
        --custom-megatron-init-path slime_hooks.check_settings \
        --custom-megatron-before-train-step-hook-path slime_hooks.before_train_step

Settings go into a YAML file, because slime's parser drops flags that it does not know.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from longact_late import attach, attach_again, restore

from megatron_longact import LongAct, LongActConfig
from megatron_longact.conversion.torch_dist import TRACKER, iteration_folder


def config_from(args: Namespace) -> LongActConfig:
    """The configuration in those settings that are called `longact_...`; `ValueError` if it makes no sense."""
    given = {key.removeprefix("longact_"): value for key, value in vars(args).items() if key.startswith("longact_")}
    known = set(LongActConfig.__dataclass_fields__)
    if set(given) - known:
        raise ValueError(f"there is no LongAct setting {sorted(set(given) - known)}; there are {sorted(known)}")
    return LongActConfig(**given)


def check_settings(args: Namespace) -> None:
    """`--custom-megatron-init-path`: refuse settings that make no sense before a model is built."""
    config_from(args)


def before_train_step(
    args: Namespace, rollout_id: int, step_id: int, model: Sequence[Any], optimizer: Any, opt_param_scheduler: Any
) -> None:
    """`--custom-megatron-before-train-step-hook-path`: attach at the first step, and hold on at each rollout.

    slime sets `finalize_model_grads_func` anew whenever it begins to train on a rollout, which is before its step 0.
    """
    if getattr(model[0], "role", "actor") != "actor":
        return
    if LongAct.of(optimizer) is None:
        longact = attach(model, optimizer, opt_param_scheduler, config_from(args))
        if _optimizer_was_loaded(args):
            restore(longact, iteration_folder(Path(args.load), getattr(args, "ckpt_step", None)))
        for chunk in model:
            chunk.register_forward_pre_hook(_name_tokens(optimizer), with_kwargs=True)
    elif step_id == 0:
        attach_again(model, optimizer)


def _optimizer_was_loaded(args: Namespace) -> bool:
    fresh = getattr(args, "finetune", False) or getattr(args, "no_load_optim", False)
    return bool(args.load) and not fresh and Path(args.load, TRACKER).is_file()


def _name_tokens(optimizer: Any) -> Any:
    """A hook that leaves the padding at the end of slime's packed row out of the statistic.

    Its `cu_seqlens` have that padding, all of token 0, as one more sequence. Under context parallelism a rank sees a
    part of the row only: there it counts.
    """

    def name(chunk: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        longact, packed = LongAct.of(optimizer), named["packed_seq_params"]
        tokens = named["input_ids"]  # [1, t]
        if longact is None or not torch.is_grad_enabled() or int(packed.cu_seqlens_q[-1]) != tokens.shape[1]:
            return
        last = torch.arange(tokens.shape[1], device=tokens.device) >= packed.cu_seqlens_q[-2]
        is_padding = (tokens[0] == 0) | ~last
        longact.set_tokens(~(last & is_padding.all())[None])

    return name
