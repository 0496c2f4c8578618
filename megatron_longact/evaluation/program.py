"""The Megatron program behind `longact evaluate --load`: a checkpoint's responses to a benchmark, and their scores."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_longact.conversion.torch_dist import iteration_name
from megatron_longact.evaluation.arguments import EvaluationConfig, add_evaluation_args, check_asked, config_from_args
from megatron_longact.evaluation.predicting import predict
from megatron_longact.evaluation.prediction_log import PredictionLog, open_log
from megatron_longact.evaluation.scoring import write_report
from megatron_longact.generation.from_args import check_longest, rollout_engine
from megatron_longact.generation.vocabulary import vocabulary_from_args
from megatron_longact.megatron.checkpoint_model import load_model, parse_args
from megatron_longact.reporting.run_log import MEGATRON_LOG, Progress, output_in_file
from megatron_longact.tasks.benchmark import MegatronEncoder
from megatron_longact.tasks.benchmarks import benchmark_from, why_alone
from megatron_longact.tasks.prompt_flags import framing_of_megatron
from megatron_longact.tasks.rows import Id, Row, check_complete

_CONTENT = {"output", "keep_inputs", "apply_chat_template"}
"""Settings that do not change what is predicted, or that others hold: `model_template` is the chat template's."""


def main() -> None:
    """Evaluate the checkpoint of `--load`, going on from what `--output` holds of the same evaluation."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config = config_from_args(add_evaluation_args(early).parse_known_args()[0])
    check_asked(config)
    with output_in_file(config.output / MEGATRON_LOG) as terminal:
        args = parse_args(add_evaluation_args)
        iteration = iteration_name(args.load, args.ckpt_step)
        initialize_megatron()
        Evaluation(args, config, iteration=iteration, terminal=terminal).run()


class Evaluation:
    """One evaluation on all ranks; rank 0 reads and writes the files and speaks.

    args: Megatron's, after `initialize_megatron`.
    """

    def __init__(self, args: Namespace, config: EvaluationConfig, *, iteration: str, terminal: TextIO) -> None:
        self.args, self.terminal = args, terminal
        self.first = args.rank == 0
        vocabulary = vocabulary_from_args(args, get_tokenizer())
        framing = framing_of_megatron(config, get_tokenizer(), args, alone=why_alone(config.benchmark))
        if self.first:
            print(*filter(None, (vocabulary.remark, framing.remark)), sep="\n", file=terminal)
        self.config = config = config.framed(framing)
        self.settings = _settings(args, config, iteration) | {"stop_token_ids": list(vocabulary.stop_ids)}
        self.encoder = MegatronEncoder(get_tokenizer(), encode=framing.encode)
        self.benchmark = benchmark_from(config.benchmark, vars(config))
        check_longest(args, self.benchmark.longest_prompt)
        self.groups = self.benchmark.samples(self.encoder, positions=args.max_position_embeddings)

    def run(self) -> None:
        """Predict what is missing, then score everything."""
        done = self._done()
        self._predict(done)
        if self.first:
            rows = self._by_id(open_log(self.config.output, self.settings))
            check_complete(rows, [each for group in self.groups for each in group.ids])
            about = {"settings": self.settings}
            write_report(self.benchmark.report(rows), output=self.config.output, terminal=self.terminal, about=about)

    def _by_id(self, rows: list[Row]) -> dict[Id, Row]:
        return self.benchmark.by_id(rows, what="predictions")

    def _done(self) -> set[Id]:
        """Ids that have a prediction, as rank 0 finds them; all ranks hear it, or its ValueError."""
        told: list[Any] = [None]
        if self.first:
            try:
                told = [list(self._by_id(open_log(self.config.output, self.settings)))]
            except ValueError as error:
                told = [str(error)]
        torch.distributed.broadcast_object_list(told, src=0)
        if isinstance(told[0], str):
            raise ValueError(told[0])
        return set(told[0])

    def _predict(self, done: set[Id]) -> None:
        total = sum(len(group.ids) for group in self.groups)
        if len(done) >= total:
            return
        self.benchmark.check_lengths(self.encoder)
        pgs = ProcessGroupCollection.use_mpu_process_groups()
        model = load_model(self.args, pgs)
        tokenizer = get_tokenizer()
        rows = predict(
            self.groups,
            rollout_engine(self.args, model, pgs, longest=self.args.max_position_embeddings),
            done=done,
            chunk=self.args.inference_max_requests * pgs.dp_cp.size(),
            temperature=self.config.temperature,
            seed=self.config.sample_seed,
            detokenize=tokenizer.detokenize,
        )
        self._write(rows, done=len(done), total=total)

    def _write(self, predictions: Any, *, done: int, total: int) -> None:
        if not self.first:
            for _ in predictions:
                pass
            return
        log, progress = PredictionLog(self.config.output), Progress(total, self.terminal, done=done)
        if done:
            progress.say(f"{done} of {total} predictions are there already")
        rows: list[Row]
        for name, rows in predictions:
            log.append(rows)
            done += len(rows)
            progress.update(done, {"": name})
        log.close()
        progress.close()


def _settings(args: Namespace, config: EvaluationConfig, iteration: str) -> dict[str, Any]:
    own = {name: value for name, value in asdict(config).items() if name not in _CONTENT}
    return {
        "checkpoint": str(Path(args.load).resolve()),
        "iteration": iteration,
        "tokenizer": args.tokenizer_model or args.tokenizer_type,
        **{name: str(value) if isinstance(value, Path) else value for name, value in own.items()},
    }
