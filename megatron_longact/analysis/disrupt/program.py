"""The Megatron program behind `longact disrupt`: load, measure, disturb, ask, report."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.global_vars import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_longact.analysis.disrupt import report as disrupt_report
from megatron_longact.analysis.disrupt.arguments import (
    FROM_CHECKPOINT,
    DisruptConfig,
    add_disrupt_args,
    config_from_args,
)
from megatron_longact.analysis.disrupt.channels import (
    Channels,
    Disturbance,
    RowMeasurement,
    RowStatistics,
    as_many,
    check_masks,
    choose_channels,
    shared,
)
from megatron_longact.analysis.disrupt.report import Run
from megatron_longact.analysis.disrupt.tasks import (
    Row,
    benchmark_of,
    measured_samples,
    official_tokens,
    responses,
    scored_samples,
)
from megatron_longact.conversion.torch_dist import iteration_folder, read_common_state
from megatron_longact.generation.engine import Prompt
from megatron_longact.generation.sampling import Sampling
from megatron_longact.generation.static import StaticRolloutEngine
from megatron_longact.generation.vocabulary import vocabulary_from_args
from megatron_longact.imported_masks import read_masks
from megatron_longact.megatron.checkpoint_model import load_model, parse_args
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.reporting.run_log import MEGATRON_LOG, Progress, output_in_file
from megatron_longact.rl.data.prose import text_windows
from megatron_longact.rl.perplexity import padded_length, perplexity
from megatron_longact.selection import QK
from megatron_longact.tasks.benchmark import MegatronEncoder
from megatron_longact.tasks.benchmarks import why_alone
from megatron_longact.tasks.prompt_flags import framing_of_megatron


def main() -> None:
    """Disturb the checkpoint of `--load`."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config = config_from_args(add_disrupt_args(early).parse_known_args()[0])
    with output_in_file(config.output / MEGATRON_LOG) as terminal:
        args = parse_args(add_disrupt_args)
        _check(args)
        folder = iteration_folder(Path(args.load), args.ckpt_step)
        initialize_megatron()
        Disruption(args, config, folder=folder, terminal=terminal).run()


def _check(args: Namespace) -> None:
    static = "it generates with the static inference engine"
    refused = {
        "--context-parallel-size": (args.context_parallel_size > 1, "noise is of whole sequences; leave it out"),
        "--inference-dynamic-batching": (args.inference_dynamic_batching, static),
        "--cuda-graph-impl": (getattr(args, "cuda_graph_impl", "none") not in (None, "none"), static),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ValueError(f"longact disrupt does not work with {flag}: {reason}")


class Disruption:
    """One analysis on all ranks; rank 0 writes the files and speaks. args: after `initialize_megatron`."""

    def __init__(self, args: Namespace, config: DisruptConfig, *, folder: Path, terminal: TextIO) -> None:
        self.args, self.folder = args, folder
        self.terminal = terminal if args.rank == 0 else None
        self.tokenizer = get_tokenizer()
        self.vocabulary = vocabulary_from_args(args, self.tokenizer)
        framing = framing_of_megatron(config, self.tokenizer, args, alone=why_alone(config.benchmark))
        if self.terminal is not None:
            print(*filter(None, (self.vocabulary.remark, framing.remark)), sep="\n", file=self.terminal)
        self.config = config = config.framed(framing)
        positions, encoder = args.max_position_embeddings, MegatronEncoder(self.tokenizer, encode=framing.encode)
        self.samples = scored_samples(config, encoder, positions=positions)
        self.measured = measured_samples(config, encoder, positions=positions)
        self.windows = _windows(config, self.tokenizer, positions=positions)
        self.pgs = ProcessGroupCollection.use_mpu_process_groups()
        self.model = load_model(args, self.pgs)
        self.qkv = QKVModel.find(self.model)
        first, *later = unwrap_model(list(self.model))
        self.engine = StaticRolloutEngine(
            first,
            later_chunks=later,
            eod=self.vocabulary.eod,
            stop_ids=self.vocabulary.stop_ids[1:],
            vocab_size=self.vocabulary.size,
            max_batch_size=args.inference_max_requests,
            dp_group=self.pgs.dp,
            expert_group=self.pgs.tp_ep,
        )

    def run(self) -> None:
        """Measure, ask the undisturbed and each disturbed model, report."""
        statistics = self._measure()
        chosen = self._choose(statistics.saliency)
        arms: list[tuple[str, str]] = [("", "")]
        arms += [(name, replacement) for replacement in self.config.replace for name in chosen]
        progress = Progress(len(arms) * len(self.samples), self.terminal) if self.terminal else None
        runs: list[Run] = []
        for label, replacement in arms:
            with self._disturbed(chosen, statistics, label, replacement):
                rows = list(self._rows(progress, label or "undisturbed", done=len(runs) * len(self.samples)))
                channels, ratio = self._sets.get(label, ("", None))
                runs.append(Run(channels, replacement, rows, self._perplexity(), ratio))
        if progress is not None:
            progress.close()
        self._report(runs, chosen, statistics)

    def _measure(self) -> RowStatistics:
        with RowMeasurement(self.qkv) as measurement:
            prompts = [Prompt(tuple(sample.tokens), index=i) for i, sample in enumerate(self.measured)]
            self.engine.generate(prompts, Sampling(max_response_length=1, greedy=True))
        return measurement.result(statistic=self.config.statistic)

    def _choose(self, saliency: QK) -> dict[str, QK]:
        """By the names of the sets: `high`, or `high 3%` where there are several shares."""
        config, layout = self.config, self.qkv.layout
        if not config.mask:
            return {
                label: choose_channels(
                    name,
                    saliency,
                    layout=layout,
                    ratio=config.ratio[0] if ratio is None else ratio,
                    scope=config.scope,
                    targets=config.targets,
                    seed=config.channel_seed,
                )
                for label, (name, ratio) in self._sets.items()
            }
        masks = check_masks(self._masks(), source=f"--mask {config.mask}", targets=config.targets)
        return {
            name: as_many(name, masks, saliency, seed=config.channel_seed, layout=layout) for name in config.channels
        }

    @cached_property
    def _sets(self) -> dict[str, tuple[Channels, float | None]]:
        """By name: which channels, and their share where there are several."""
        names, ratios = self.config.channels, self.config.ratio
        if len(ratios) == 1:
            return {name: (name, None) for name in names}
        return {f"{name} {100 * ratio:g}%": (name, ratio) for ratio in ratios for name in names}

    def _masks(self) -> QK:
        if self.config.mask == FROM_CHECKPOINT:
            return _checkpoint_masks(self.folder, self.qkv)
        try:
            return read_masks(Path(self.config.mask), self.qkv.layout, self.qkv.layer_numbers, self.config.targets)
        except ValueError as error:
            raise ValueError(str(error).replace("--longact-import-mask", "--mask")) from error

    def _disturbed(
        self, chosen: dict[str, QK], statistics: RowStatistics, label: str, replacement: Any
    ) -> AbstractContextManager[Any]:
        if not label:
            return nullcontext()
        needed = [len(sample.tokens) + sample.tokens_to_generate for sample in self.samples]
        return Disturbance(
            self.qkv,
            chosen[label],
            replacement=replacement,
            statistics=statistics,
            seed=self.config.channel_seed,
            positions=padded_length(max(*needed, self.config.text_tokens), self.pgs),
        )

    def _rows(self, progress: Progress | None, name: str, *, done: int) -> Iterator[Row]:
        for rows in responses(
            self.samples,
            self.engine,
            chunk=self.args.inference_max_requests * self.pgs.dp.size(),
            detokenize=self.tokenizer.detokenize,
            score=benchmark_of(self.config).score,
        ):
            yield from rows
            done += len(rows)
            if progress is not None:
                progress.update(done, {"": name})

    def _perplexity(self) -> float | None:
        if not self.windows:
            return None
        return perplexity(self.model, self.windows, vocab_size=self.vocabulary.size, pgs=self.pgs)

    def _report(self, runs: list[Run], chosen: dict[str, QK], statistics: RowStatistics) -> None:
        if self.terminal is None:
            return
        results: dict[str, Any] = {
            "settings": _settings(self.args, self.config, self.folder),
            "measured": {"prompts": len(self.measured), "tokens": statistics.tokens},
            "official_tokens": official_tokens(self.config),
            "channels": {name: _described(masks, chosen) for name, masks in chosen.items()},
            "runs": [run.results() for run in runs],
        }
        output = self.config.output
        disrupt_report.write(results, runs, output=output, show=self.config.show)
        print(disrupt_report.table(results["runs"]), file=self.terminal)
        print(disrupt_report.legend(results), file=self.terminal)
        written = [disrupt_report.RESULTS, disrupt_report.RESPONSES, disrupt_report.SAMPLES]
        if find_spec("matplotlib") is not None:
            from megatron_longact.analysis.disrupt.plots import plot

            plot(results, path=output / disrupt_report.PICTURE)
            written.append(disrupt_report.PICTURE)
        print(f"{', '.join(written)} in {output}", file=self.terminal, flush=True)
        if self.config.html is not None:
            disrupt_report.write_html(results, runs, folder=output, path=self.config.html, show=self.config.show)


def _windows(config: DisruptConfig, tokenizer: Any, *, positions: int) -> list[list[int]]:
    if config.text_tokens > positions:
        raise ValueError(f"--text-tokens is {config.text_tokens}, but the model has {positions} positions")
    return text_windows(config.text, tokenizer, length=config.text_tokens, count=config.text_windows)


def _checkpoint_masks(folder: Path, model: QKVModel) -> QK:
    state = (read_common_state(folder).get("opt_param_scheduler") or {}).get("longact")
    if state is None or state["masks"] is None:
        raise ValueError(f"--mask checkpoint: {folder} holds no LongAct masks; leave --mask out to measure channels")
    if state["layout"] != model.layout.saved() or state["layer_numbers"] != list(model.layer_numbers):
        raise ValueError(f"--mask checkpoint: the masks in {folder} are those of a model with other layers or heads")
    return QK(state["masks"]["q"].bool(), state["masks"]["k"].bool())


def _described(masks: QK, chosen: dict[str, QK]) -> dict[str, Any]:
    return {
        "q": int(masks.q.sum()),
        "k": int(masks.k.sum()),
        "also_in": {name: round(shared(masks, other), 4) for name, other in chosen.items()},
    }


def _settings(args: Namespace, config: DisruptConfig, folder: Path) -> dict[str, Any]:
    own = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    return {"checkpoint": str(folder), "tokenizer": args.tokenizer_model or args.tokenizer_type, **own}
