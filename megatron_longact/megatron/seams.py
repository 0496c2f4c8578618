"""LongAct in any program built on `megatron.training`: the seams, held open by one context manager.

| seam of megatron.training | what LongAct does there |
|---|---|
| `arguments.parse_args` | knows the `--longact-*` flags, and refuses at once what does not work; names W&B's run |
| `checkpointing.load_args_from_checkpoint` | `--use-checkpoint-args` also sets q/k-layernorm and so on; tokenizer |
| `argument_utils.gpt_config_from_args` | `--rope-scaling-factor` reaches the model |
| `training.get_megatron_optimizer` | attaches to the model chunks and the optimizer, before a checkpoint loads |
| the same, with `--perform-rl-step` | names the tokens that count: all but padding |
| `training.get_optimizer_param_scheduler` | lets the scheduler's state carry LongAct's |
| `training.load_checkpoint` | derives weights in FP8 from the masters once more when weights alone are loaded again |
| `training.save_checkpoint` | copies config.json and tokenizer of a converted model along |
| `training.train_step` | counts what one line says at the end: `run_summary` |
| `training.finalize_model_grads` | LongAct's, which Megatron before 0.19 would put its own in the place of |
| `training.training_log` | writes LongAct's scalars to TensorBoard, and those of the GPUs |
"""

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import wraps
from typing import Any

import torch
from megatron.core.utils import get_model_config
from megatron.training import argument_utils, arguments, checkpointing, initialize, training
from megatron.training.global_vars import get_args, get_tokenizer

from megatron_longact.arguments import add_longact_args, longact_config_from_args
from megatron_longact.config import LongActConfig
from megatron_longact.conversion.megatron_args import completing, with_rope_scaling_factor
from megatron_longact.conversion.model_files import keep_model_files
from megatron_longact.longact import LongAct
from megatron_longact.megatron import telemetry
from megatron_longact.megatron.checkpointing import carry_state, check_converted, check_load, resume_note, say_if_there
from megatron_longact.megatron.run_summary import said_at_the_end
from megatron_longact.megatron.scalar_writers import scalar_writer, settle_wandb
from megatron_longact.optimizer_shards import derive_quantized_weights
from megatron_longact.refusals import check_settings, check_tap
from megatron_longact.versions import seams_here

logger = logging.getLogger(__name__)


@contextmanager
def attached() -> Iterator[None]:
    """While this is open, a Megatron program that is given `--longact` runs with LongAct.

    Raises in the program: `ValueError` with one clear line for flags that do not make sense or do not work
    together. On leaving, Megatron's functions are as before and every LongAct is detached.
    """
    instances: list[LongAct] = []
    _show_log()
    with ExitStack() as seams:
        seams.callback(_detach_all, instances)
        seams.callback(telemetry.stop)
        seams.enter_context(said_at_the_end(instances))
        seams.enter_context(_replaced(arguments, "parse_args", _parsing))
        for name in seams_here(initialize, "parse_args"):
            seams.enter_context(_replaced(initialize, name, _parsing))
        seams.enter_context(_replaced(checkpointing, "load_args_from_checkpoint", completing))
        for name in seams_here(argument_utils, "gpt_config_from_args"):
            seams.enter_context(_replaced(argument_utils, name, with_rope_scaling_factor))
        seams.enter_context(_replaced(training, "get_megatron_optimizer", _attaching, instances, seams))
        seams.enter_context(_replaced(training, "get_optimizer_param_scheduler", _carrying))
        seams.enter_context(_replaced(training, "load_checkpoint", _reloading, instances))
        seams.enter_context(_replaced(training, "save_checkpoint", _keeping_model_files))
        seams.enter_context(_replaced(training, "training_log", _logging, instances))
        yield


def _detach_all(instances: list[LongAct]) -> None:
    for instance in instances:
        instance.detach()


@contextmanager
def _replaced(module: Any, name: str, wrap: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, wrap(original, *arguments))
    try:
        yield
    finally:
        setattr(module, name, original)


def check_args(args: Namespace) -> LongActConfig | None:
    """The configuration that the flags ask for; `ValueError` if it makes no sense or does not work."""
    config = longact_config_from_args(args)
    if config is not None:
        check_settings(args)
        check_tap(config, args)
        check_load(args)
    return config


def _show_log() -> None:
    logger = logging.getLogger("megatron_longact")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.propagate = False


def _parsing(original: Callable[..., Namespace]) -> Callable[..., Namespace]:
    @wraps(original)
    def parse_args(
        extra_args_provider: Callable[[ArgumentParser], ArgumentParser] | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Namespace:
        def add_args(parser: ArgumentParser) -> ArgumentParser:
            groups = list(parser._action_groups)
            parser = telemetry.add_telemetry_args(add_longact_args(parser))
            parser = parser if extra_args_provider is None else extra_args_provider(parser)
            _tidy_help(parser, megatrons=groups)
            return parser

        args = original(add_args, *rest, **kwargs)
        check_converted(args)
        note = resume_note(args)
        if note is not None and args.rank == 0:
            logger.warning("%s", note)
        config = check_args(args)
        telemetry.check_telemetry_args(args)
        settle_wandb(args)
        if config is not None:  # Megatron prints and saves the values that are in force
            vars(args).update({f"longact_{name}": value for name, value in asdict(config).items()})
        return args

    return parse_args


def _tidy_help(parser: ArgumentParser, *, megatrons: list[Any]) -> None:
    """Make `--help` readable: it ends in an error where a text has a bare %, and Megatron's flags are a thousand lines.

    megatrons: the groups of flags that were there before ours; the first two are argparse's own.
    """
    parser.usage = parser.usage or "%(prog)s FLAGS, of which ours come first"
    ours = [group for group in parser._action_groups if group not in megatrons]
    parser._action_groups[2:] = ours + megatrons[2:]
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def _attaching(original: Callable[..., Any], instances: list[LongAct], seams: ExitStack) -> Callable[..., Any]:
    @wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: Any, *rest: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *rest, **kwargs)
        if get_args().log_gpu_telemetry_to_tensorboard:
            telemetry.start(interval_s=get_args().gpu_telemetry_interval)
        longact_config = longact_config_from_args(get_args())
        if longact_config is not None:
            longact = LongAct.attach(model_chunks, optimizer, longact_config)
            instances.append(longact)
            _keep_finalize(seams, get_model_config(model_chunks[0]))
            if getattr(get_args(), "perform_rl_step", False):
                _name_rollout_tokens(model_chunks, longact, seams)
        return optimizer

    return get_megatron_optimizer


def _keep_finalize(seams: ExitStack, model_config: Any) -> None:
    """Let `train` find LongAct's function: until 0.18 it sets its own, whatever the config has (see `versions`)."""
    finalize = model_config.finalize_model_grads_func
    seams.enter_context(_replaced(training, "finalize_model_grads", lambda _: finalize))


def _name_rollout_tokens(model_chunks: Any, longact: LongAct, seams: ExitStack) -> None:
    """Let every token but padding count in `megatron.rl`, whose packed_seq_params have padding as a sequence.

    Not under context parallelism, where a chunk is given a part of the sequences.
    """

    def name(chunk: Any, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():  # the inference engine calls the chunk in its own way
            longact.set_tokens(inputs[0] != get_tokenizer().pad)

    for chunk in model_chunks if get_args().context_parallel_size == 1 else ():
        seams.callback(chunk.register_forward_pre_hook(name).remove)


_DENSE_NOW = (
    "the checkpoint was trained with LongAct, and this run goes on without it: it updates every row of Q and K; give "
    "--longact to go on with it"
)


def _carrying(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_optimizer_param_scheduler(optimizer: Any, *rest: Any, **kwargs: Any) -> Any:
        scheduler = original(optimizer, *rest, **kwargs)
        longact = LongAct.of(optimizer)
        if longact is not None:
            carry_state(scheduler, "longact", longact)
        else:
            say_if_there(scheduler, "longact", _DENSE_NOW)
        return scheduler

    return get_optimizer_param_scheduler


def _reloading(original: Callable[..., Any], instances: list[LongAct]) -> Callable[..., Any]:
    """Megatron's RL loop loads the weights of a resumed run once more, after the masters; not so the start weights."""

    @wraps(original)
    def load_checkpoint(ddp_model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> Any:
        loaded = original(ddp_model, optimizer, *rest, **kwargs)
        if optimizer is None and not get_args().finetune:
            for instance in instances:
                if instance.state.updates:
                    derive_quantized_weights(instance._optimizer)
        return loaded

    return load_checkpoint


def _keeping_model_files(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        saved = original(*args, **kwargs)
        keep_model_files(get_args())
        return saved

    return save_checkpoint


def _logging(original: Callable[..., Any], instances: list[LongAct]) -> Callable[..., Any]:
    @wraps(original)
    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if iteration % get_args().tensorboard_log_interval == 0:
            for instance in instances:
                write_scalars(instance.metrics(), iteration)
            write_scalars(telemetry.scalars(iteration), iteration)
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **kwargs)

    return training_log


def write_scalars(scalars: dict[str, float | None], iteration: int) -> None:
    """Write scalars where Megatron's own go, TensorBoard and W&B, on the rank that has them; None is left out."""
    writer = scalar_writer()
    if writer is not None:
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, iteration)
