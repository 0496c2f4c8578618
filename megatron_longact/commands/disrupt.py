"""Replace the activations of high, low or random Q and K channels, and see what the model loses.

The channels are measured on prompts of the very tasks (or taken from LongAct's masks: --mask), replaced by their mean
(or zero, or noise) at the output of linear_qkv, and the model is asked: accuracy by context length, repetition,
perplexity of text, beside the undisturbed model. Megatron's own flags of the model go with it:

    source examples/demo/model_args.sh
    longact disrupt --load examples/demo/start_checkpoint "${MODEL_ARGS[@]}"
    torchrun --standalone --nproc-per-node 2 -m megatron_longact disrupt --load CHECKPOINTS \
        --tensor-model-parallel-size 2 --benchmark ruler --tasks niah_single_1 vt --lengths 4096 8192 ...

Results are in --output (default: runs/disrupt): results.json, responses.jsonl, samples.md, disruption.png.
"""

import argparse
from pathlib import Path

from megatron_longact.megatron.tool_command import become_megatron_program, check_file, check_new, end_in_one_line


def main(argv: list[str]) -> int:
    """Run the analysis; the exit status: 2 for flags that make no sense, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="A Megatron checkpoint; Megatron's flags go with it.")
    parser.add_argument("--cpu", action="store_true", help="Run on the CPU; without a GPU that happens by itself.")

    from megatron_longact.analysis.disrupt.arguments import add_disrupt_args, config_from_args
    from megatron_longact.analysis.disrupt.report import RESULTS

    args, _ = add_disrupt_args(parser).parse_known_args(argv)

    def action() -> None:
        config_from_args(args)
        check_file(args.html, flag="--html")
        check_new(args.output / RESULTS, overwrite=args.overwrite)
        become_megatron_program([argument for argument in argv if argument != "--cpu"], cpu=args.cpu)
        from megatron_longact.analysis.disrupt import program as disrupt_program

        disrupt_program.main()

    return end_in_one_line("disrupt", action)
