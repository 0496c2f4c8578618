"""Supervised training on the needle tasks: an ordinary `megatron.training` program that makes the demo's start model.

It knows nothing of LongAct. The data is a curriculum of phases, each with its own tasks, lengths and number of
iterations; all samples of an iteration have one length. The loss is the mean over the answers' tokens plus a
little of the prompts' (`--prompt-loss-weight`), which lets the copying heads form sooner. See
`make_start_checkpoint.sh` for the command.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import average_losses_across_data_parallel_group

from megatron_longact.tasks.needle import NEEDLE_TASKS, NeedleGenerator, NeedleSample, NeedleTask


class NeedleDataset(torch.utils.data.Dataset):
    """Sample `index` belongs to iteration `index // batch_size`, whose phase gives its tasks and its length.

    Items: `tokens` and `labels` int64 [s], `answer` bool [s] and `prompt` bool [s]: which labels belong to the answer
    (end-of-text included) and to the prompt. s is the prompt's length plus room for the longest answer of the phase.
    """

    def __init__(self, phases: list[tuple[int, NeedleGenerator]], *, batch_size: int, eod: int, pad: int) -> None:
        self.generators = [generator for iterations, generator in phases for _ in range(iterations)]
        self.batch_size, self.eod, self.pad = batch_size, eod, pad

    def __len__(self) -> int:
        return len(self.generators) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, place = divmod(index, self.batch_size)
        generator = self.generators[step]
        return self._encode(generator.sample(step, place), generator)

    def _encode(self, sample: NeedleSample, generator: NeedleGenerator) -> dict[str, torch.Tensor]:
        answer = [*generator.pieces.piece(sample.answer), self.eod]
        padding = [self.pad] * (_answer_room(generator) - len(answer))
        ids = torch.tensor([*sample.prompt_ids, *answer, *padding])
        place = torch.arange(1, len(ids))
        is_answer = (place >= sample.length) & (place < sample.length + len(answer))
        return {"tokens": ids[:-1], "labels": ids[1:], "answer": is_answer, "prompt": place < sample.length}


def _answer_room(generator: NeedleGenerator) -> int:
    """Tokens that an answer of the generator's tasks can take, end-of-text included: 3 a value."""
    return 1 + 3 * max(task.num_queries * task.num_values for task in generator.tasks)


def parse_phase(text: str) -> tuple[int, list[int], list[str | NeedleTask]]:
    """'250:64,80:single,multikey' -> iterations, lengths, tasks.

    A task is a name of `NEEDLE_TASKS` or K.V.Q, for K hidden keys with V values each and Q of them asked for.
    """
    try:
        iterations, lengths, tasks = text.split(":")
        return int(iterations), [int(length) for length in lengths.split(",")], [_task(t) for t in tasks.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ITERATIONS:LENGTH,...:TASK,... ({error})") from error


def _task(text: str) -> str | NeedleTask:
    if text in NEEDLE_TASKS:
        return text
    num_keys, num_values, num_queries = (int(number) for number in text.split("."))
    return NeedleTask(text, num_keys=num_keys, num_values=num_values, num_queries=num_queries)


def add_task_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags that Megatron's own parser lacks."""
    group = parser.add_argument_group("needle tasks")
    group.add_argument("--phase", type=parse_phase, nargs="+", required=True, help=parse_phase.__doc__)
    group.add_argument("--prompt-loss-weight", type=float, default=0.1, help="weight of the prompt's tokens")
    return parser


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> list[NeedleDataset | None]:
    """The training set alone; `--train-iters` beyond the phases' sum is refused by Megatron's sampler."""
    args, tokenizer = get_args(), get_tokenizer()
    phases = [
        (iterations, NeedleGenerator(tokenizer, tasks=tasks, lengths=lengths, seed=args.seed, same_length=True))
        for iterations, lengths, tasks in args.phase
    ]
    return [NeedleDataset(phases, batch_size=args.global_batch_size, eod=tokenizer.eod, pad=tokenizer.pad), None, None]


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(batch: dict[str, torch.Tensor], losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over answer tokens plus the weighted mean over prompt tokens; losses [b, s]."""
    means = [(losses * batch[part]).sum() / batch[part].sum() for part in ("answer", "prompt")]
    loss = means[0] + get_args().prompt_loss_weight * means[1]
    averaged = average_losses_across_data_parallel_group([mean.detach() for mean in means])
    return loss, {"answer loss": averaged[0], "prompt loss": averaged[1]}


def forward_step(data_iterator, model):  # type: ignore[no-untyped-def]
    """One micro-batch; every tensor-parallel rank reads the same samples."""
    batch = {name: tensor.cuda() for name, tensor in next(data_iterator).items()}
    b, s = batch["tokens"].shape
    position_ids = torch.arange(s, device=batch["tokens"].device).expand(b, s)
    attention_mask = torch.ones(1, 1, s, s, dtype=torch.bool, device=position_ids.device).triu(1)
    return model(batch["tokens"], position_ids, attention_mask, labels=batch["labels"]), partial(loss_func, batch)


if __name__ == "__main__":
    arguments = parse_and_validate_args(extra_args_provider=add_task_args)
    pretrain(
        pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
