"""A Hugging Face folder with random weights, of any size, to try the conversion tools on.

python tools/make_random_hf_model.py --save OUT                           # a Qwen3 of 3 MB
python tools/make_random_hf_model.py --save OUT --tokenizer --vocab-size 257     # to train it, too
python tools/make_random_hf_model.py --save OUT --num-layers 24 --hidden-size 2048 --vocab-size 151936   # 3.4 GB
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_longact.conversion import command, synthetic
from megatron_longact.conversion.hf_config import FAMILIES


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """A config.json in the proportions of Qwen3."""
    heads = max(args.hidden_size // 128, 4)
    config: dict[str, Any] = {
        "model_type": args.model_type,
        "architectures": [FAMILIES[args.model_type].architecture],
        "num_hidden_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": 3 * args.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 2),
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": args.tied,
        "hidden_act": "silu",
        "sliding_window": None,
        "dtype": args.dtype,
    }
    if FAMILIES[args.model_type].experts:
        config |= {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
        config["moe_intermediate_size"] = args.hidden_size
    return config


def _write(args: argparse.Namespace) -> str:
    return synthetic.write(config_of(args), args.save, seed=args.seed, tokenizer=args.tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, required=True, help="the folder; must not exist")
    parser.add_argument("--model-type", choices=sorted(FAMILIES), default="qwen3")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and output layer")
    parser.add_argument("--tokenizer", action="store_true", help="with one whose tokens are bytes: 257 of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(command.run(lambda: _write(arguments)))
