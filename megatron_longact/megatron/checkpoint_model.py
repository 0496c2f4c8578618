"""A checkpoint's model for programs that only look at it: Megatron's flags, its arguments, and no optimizer."""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch import nn

from megatron_longact.conversion.megatron_args import completing, with_rope_scaling_factor
from megatron_longact.conversion.model_files import NEEDS_TOKENIZER
from megatron_longact.megatron.checkpointing import check_converted

_FLAGS = ("--skip-train", "--no-load-optim", "--no-load-rng", "--micro-batch-size=1", "--seq-length=64")
"""What Megatron asks every program for, or would otherwise load."""


def parse_args(add_args: Callable[[ArgumentParser], ArgumentParser] | None = None) -> Namespace:
    """Megatron's arguments, out of `sys.argv`; `--use-checkpoint-args` sets all that describes the model.

    A tokenizer that is given is taken, also where Megatron would take the one of the run that saved the checkpoint.
    add_args: adds the program's own flags.
    """
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--load")
    check_converted(early.parse_known_args()[0])
    given = {argument.split("=", 1)[0] for argument in sys.argv}
    sys.argv += [flag for flag in _FLAGS if flag.split("=", 1)[0] not in given]
    original = checkpointing.load_args_from_checkpoint
    checkpointing.load_args_from_checkpoint = completing(original)

    def add(parser: ArgumentParser) -> ArgumentParser:
        parser.set_defaults(**{NEEDS_TOKENIZER: True})
        return parser if add_args is None else add_args(parser)

    try:
        return validated_args(add)
    finally:
        checkpointing.load_args_from_checkpoint = original


def validated_args(add_args: Callable[[ArgumentParser], ArgumentParser]) -> Namespace:
    """Megatron's arguments, out of `sys.argv`. Raises `ValueError`, in one line, for what Megatron asserts of them."""
    try:
        return parse_and_validate_args(extra_args_provider=add_args)
    except AssertionError as error:
        given = {argument.partition("=")[0] for argument in sys.argv}
        about_the_model = "num-layers" in str(error) and "--use-checkpoint-args" not in given
        hint = "; --use-checkpoint-args takes what describes the model from the checkpoint" if about_the_model else ""
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"Megatron does not take these flags: {said}{hint}") from error


def load_model(args: Namespace, pg_collection: ProcessGroupCollection) -> Sequence[nn.Module]:
    """The model chunks of this rank with the weights of `--load`; after `initialize_megatron`."""
    config = with_rope_scaling_factor(gpt_config_from_args)(args)
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=pg_collection,
    )
    chunks: Sequence[nn.Module] = model
    return chunks
