r"""How fast the evaluation's engine answers, against `transformers.generate`: the same prompts and weights, in turn.

    OMP_NUM_THREADS=1 python tools/benchmark_generation.py --hf-dir FOLDER --load CHECKPOINTS --use-checkpoint-args \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER

Prompts are RULER's, greedy, fp32, of nearly one length. Seconds are those that the process had a core for: other work
on the machine does not count. `first`: `transformers` up to the first token of each answer, what a batch cannot save;
`alone`: the engine with one prompt at a time; `together`: --inference-max-requests.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch

from megatron_longact.megatron.tool_command import become_megatron_program, end_in_one_line

HEADS = (
    "tokens",
    "prompts",
    "first, s",
    "transformers, s",
    "alone, s",
    "together, s",
    "together / transformers",
    "same tokens",
)


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that Megatron does not have; returns the parser."""
    parser.add_argument("--hf-dir", type=Path, required=True, help="The model's Hugging Face folder.")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096], metavar="TOKENS")
    parser.add_argument("--num-samples", type=int, default=8, help="Prompts of each length.")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1, help="Times that each is measured; the least counts.")
    return parser


def core_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of all of the process's threads, and what the action returns."""
    begun = time.process_time()
    result = action()
    return time.process_time() - begun, result


def main(argv: list[str]) -> None:
    """Measure and print a table."""
    add_args(argparse.ArgumentParser(description=__doc__, allow_abbrev=False)).parse_known_args(argv)  # may be --help
    become_megatron_program(argv, cpu=not measuring.ON_GPU)
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.global_vars import get_tokenizer
    from megatron.training.initialize import initialize_megatron
    from transformers import AutoModelForCausalLM

    from megatron_longact.generation.engine import Prompt
    from megatron_longact.generation.sampling import Sampling
    from megatron_longact.generation.static import StaticRolloutEngine
    from megatron_longact.generation.vocabulary import vocabulary_from_args
    from megatron_longact.megatron.checkpoint_model import load_model, parse_args
    from megatron_longact.tasks.benchmark import MegatronEncoder
    from megatron_longact.tasks.ruler.benchmark import Ruler

    args = parse_args(add_args)
    initialize_megatron()
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    model = unwrap_model(load_model(args, pgs)[0])
    vocabulary = vocabulary_from_args(args, get_tokenizer())
    reference = AutoModelForCausalLM.from_pretrained(args.hf_dir, dtype=torch.float32).to(measuring.DEVICE).eval()
    sampling = Sampling(max_response_length=args.new_tokens, greedy=True)

    def engine(most: int) -> StaticRolloutEngine:
        return StaticRolloutEngine(
            model,
            eod=vocabulary.eod,
            stop_ids=vocabulary.stop_ids[1:],
            vocab_size=vocabulary.size,
            max_batch_size=most,
            dp_group=pgs.dp,
        )

    def ours(prompts: list[list[int]], most: int) -> list[list[int]]:
        made = engine(most).generate([Prompt(tuple(p), index=i) for i, p in enumerate(prompts)], sampling)
        return [row[:length].tolist() for row, length in zip(made.tokens, made.lengths.tolist(), strict=True)]

    @torch.no_grad()
    def theirs(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ends = list(vocabulary.stop_ids)
        settings = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
        }
        ids = [torch.tensor([p], device=measuring.DEVICE) for p in prompts]
        return [
            reference.generate(p, attention_mask=torch.ones_like(p), **settings)[0, p.shape[1] :].tolist() for p in ids
        ]

    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS), flush=True)
    for length in args.lengths:
        asked = Ruler(
            tasks=("niah_multikey_1",), lengths=(length,), num_samples=args.num_samples, tokens_to_generate=24
        )
        [group] = asked.samples(MegatronEncoder(get_tokenizer()), positions=args.max_position_embeddings)
        prompts = [list(sample.tokens) for sample in group.make()]
        arms: list[Callable[[], list[list[int]]]] = [
            lambda prompts=prompts: theirs(prompts, 1),  # type: ignore[misc]
            lambda prompts=prompts: theirs(prompts, args.new_tokens),  # type: ignore[misc]
            lambda prompts=prompts: ours(prompts, 1),  # type: ignore[misc]
            lambda prompts=prompts: ours(prompts, args.inference_max_requests),  # type: ignore[misc]
        ]
        runs = [[core_seconds(arm) for arm in arms] for _ in range(args.repeats)]
        best = [min(run[arm][0] for run in runs) for arm in range(len(arms))]
        tokens = [answer for _, answer in runs[0]]
        same = sum(one == other for one, other in zip(tokens[1], tokens[3], strict=True))
        cells = [f"{seconds:.1f}" for seconds in best] + [f"{best[3] / best[1]:.2f}", f"{same} of {len(prompts)}"]
        print(f"| {length} | {len(prompts)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(end_in_one_line("benchmark_generation", lambda: main(sys.argv[1:])))
