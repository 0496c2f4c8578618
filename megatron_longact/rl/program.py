"""A GRPO run put together from Megatron's arguments."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.initialize import initialize_megatron
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_longact.generation.from_args import check_longest, rollout_engine
from megatron_longact.generation.vocabulary import vocabulary_from_args
from megatron_longact.longact import LongAct
from megatron_longact.megatron.checkpointing import check_load, check_schedule
from megatron_longact.megatron.planned_attention import take_plans
from megatron_longact.megatron.scalar_writers import scalar_writer
from megatron_longact.megatron.tool_command import end_together
from megatron_longact.reporting.run_log import RunLog
from megatron_longact.rl.answers import AnswerLog
from megatron_longact.rl.arguments import parts_of_rows
from megatron_longact.rl.audit import RowAudit, RowHistory
from megatron_longact.rl.batches.micro_batches import BatchLayout
from megatron_longact.rl.bf16_changes import Bf16Changes
from megatron_longact.rl.collect import Collector
from megatron_longact.rl.config import RLConfig
from megatron_longact.rl.data.arguments import build_environment
from megatron_longact.rl.data.curriculum import Curriculum
from megatron_longact.rl.data.environment import Environment, NeedleEnvironment
from megatron_longact.rl.data.prose import ProseConfig, text_windows
from megatron_longact.rl.data.ruler import RulerEnvironment
from megatron_longact.rl.heldout import Judge
from megatron_longact.rl.log_probs import ResponseScorer, TrainerLogProbs
from megatron_longact.rl.loop import RLLoop
from megatron_longact.rl.objectives.objective import Objective
from megatron_longact.rl.objectives.token_selection import TokenSelector
from megatron_longact.rl.outcome import write_outcome
from megatron_longact.rl.perplexity import perplexity
from megatron_longact.rl.reference import ReferenceWeights, start_reference
from megatron_longact.rl.report import REPORT
from megatron_longact.rl.run_files import write_versions
from megatron_longact.rl.run_folder import open_run
from megatron_longact.rl.state import LoopState, carried_in_checkpoints
from megatron_longact.rl.trainer import MegatronTrainer, stop_on_signals
from megatron_longact.rl.update import PolicyUpdate
from megatron_longact.tasks.chat import PromptEncoder

SEQUENCE_MULTIPLE = 16
"""Padded sequences are a multiple of this: FP8 kernels ask for it, and fewer shapes occur."""


def environment_of(config: RLConfig, *, say: Callable[[str], None]) -> Environment:
    """The tasks of a run, with Megatron's tokenizer; raises ValueError, in one line, for what cannot be.

    say: is given a line on what ends a response, and one for each data set that was read.
    """
    tokenizer = get_tokenizer()
    say(vocabulary_from_args(get_args(), tokenizer).remark)

    def needles(curriculum: Curriculum) -> NeedleEnvironment:
        return NeedleEnvironment(
            tokenizer,
            names=config.needle_tasks,
            lengths=config.context_lengths,
            heldout_lengths=config.heldout_context_lengths,
            seed=config.seed,
            curriculum=curriculum,
        )

    def ruler(encoder: PromptEncoder, names: Sequence[str], curriculum: Curriculum) -> RulerEnvironment:
        return RulerEnvironment(
            encoder,
            names=names,
            lengths=config.context_lengths,
            heldout_lengths=config.heldout_context_lengths,
            response_length=config.max_response_length,
            seed=config.seed,
            curriculum=curriculum,
        )

    return build_environment(
        config.data,
        tokenizer,
        needles=needles,
        ruler=ruler,
        max_prompt_length=config.longest_prompt,
        prompts_per_step=config.prompts_per_step,
        seed=config.seed,
        say=say,
    )


def run(args: Namespace, config: RLConfig, environment: Environment, *, terminal: TextIO) -> None:
    """Train from the first iteration, or the saved one, to the last; table and report at the end."""
    say = _speaker(args, terminal)
    if args.rl_defaults:
        say(f"not given, so as this program has it: {' '.join(args.rl_defaults)}")
    check_longest(args, environment.longest_prompt)
    loop = build_loop(args, config, environment, terminal=terminal)
    if args.rank == 0:
        write_versions(Path(args.run_dir))
    if not loop.run():
        if loop.verdict is not None:
            _tell_torchrun(loop.verdict)
        end_together()
        sys.exit(loop.exit_code)
    rows = loop.count_rows()
    if args.rank == 0:
        table = write_outcome(args, config, evaluations=loop.evaluations, rows=rows, longact=loop.longact)
        print(f"{table}\nmetrics, checkpoints, pictures and {REPORT} are in {args.run_dir}", file=terminal)
    end_together()


def _tell_torchrun(line: str) -> None:
    """Let torchrun's list of the ranks that failed say why."""
    try:
        raise RuntimeError(line)
    except RuntimeError as error:
        get_error_handler().record_exception(error)


def _speaker(args: Namespace, terminal: TextIO) -> Callable[[str], None]:
    """Prints lines, on rank 0."""
    return lambda line: print(line, file=terminal, flush=True) if args.rank == 0 else None


def build_loop(args: Namespace, config: RLConfig, environment: Environment, *, terminal: TextIO) -> RLLoop:
    """Initialise Megatron, build or load model and optimizer, and put the loop around them.

    Attaches nothing by itself: LongAct is found if the launcher's seams are open.
    """
    check_load(args)
    if args.rank == 0:
        open_run(args, say=_speaker(args, terminal))
        check_schedule(args)
    initialize_megatron()
    stop_on_signals(args)
    state = LoopState()
    trainer = _trainer(args, state)
    if config.shared_prompts:
        take_plans(trainer.model)
    pgs = trainer.pg_collection
    vocabulary = vocabulary_from_args(args, get_tokenizer())
    scorer = ResponseScorer(
        temperature=config.temperature,
        vocab_size=vocabulary.size,
        tp_group=pgs.tp,
        cp_group=pgs.cp,
        chunk_size=config.logits_chunk_size,
    )
    layout = BatchLayout.of_rank(
        config,
        pgs,
        pad_token=vocabulary.eod,
        multiple_of=_sequence_multiple(args),
        step_multiple=trainer.config.microbatch_group_size_per_vp_stage if len(trainer.model) > 1 else 1,
    )
    trainer_log_probs = TrainerLogProbs(trainer.model, scorer, layout, pg_collection=pgs)
    longact, log = LongAct.of(trainer.optimizer), _log(args, terminal, state)
    detokenize = get_tokenizer().detokenize
    return RLLoop(
        trainer,
        state=state,
        collector=Collector(
            config,
            engine=rollout_engine(args, trainer.model, pgs),
            judge=Judge(environment, detokenize, torch.distributed.group.WORLD),
            trainer_log_probs=trainer_log_probs,
            reference=_reference(config, trainer),
            prose=_prose(config.data.prose, trainer, vocab_size=vocabulary.size),
            answers=AnswerLog(config.answers, log, detokenize=detokenize, iteration=lambda: trainer.iteration),
        ),
        update=PolicyUpdate(
            trainer,
            layout=layout,
            objective=Objective(config, scorer, longact, dp_size=pgs.dp.size()),
            selector=TokenSelector(config, trainer_log_probs),
            trainer_log_probs=trainer_log_probs,
        ),
        audit=_audit(config, trainer, longact, state.rows),
        log=log,
    )


def _sequence_multiple(args: Namespace) -> int:
    return math.lcm(SEQUENCE_MULTIPLE * args.context_parallel_size, parts_of_rows(args))


def _audit(config: RLConfig, trainer: MegatronTrainer, longact: LongAct | None, history: RowHistory | None) -> RowAudit:
    audited = (trainer.model, trainer.optimizer, longact)
    bf16 = Bf16Changes(*audited) if config.count_bf16_changes else None
    return RowAudit(*audited, since=trainer.iteration, history=history, bf16=bf16)


def _prose(prose: ProseConfig, trainer: MegatronTrainer, *, vocab_size: int) -> Callable[[], float] | None:
    if not prose.windows:
        return None
    windows = text_windows(prose.file, get_tokenizer(), length=prose.tokens, count=prose.windows)
    return partial(perplexity, trainer.model, windows, vocab_size=vocab_size, pgs=trainer.pg_collection)


def _reference(config: RLConfig, trainer: MegatronTrainer) -> ReferenceWeights | None:
    if config.kl_beta == 0:
        return None
    return start_reference(trainer.model, trainer.args, offload=config.offload_reference)


def _trainer(args: Namespace, state: LoopState) -> MegatronTrainer:
    context: dict[str, Any] = {}
    with carried_in_checkpoints("rl", state):
        model, optimizer, scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context=context,
            cfg_container=pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return MegatronTrainer(args, model, optimizer, scheduler, checkpointing_context=context)


def _log(args: Namespace, terminal: TextIO, state: LoopState) -> RunLog:
    return RunLog(
        Path(args.run_dir) if args.rank == 0 else None,
        terminal,
        scalar_writer(),
        total=args.train_iters,
        done=args.iteration,
        evaluated=state.evaluations[-1]["iteration"] if state.evaluations else -1,
    )
