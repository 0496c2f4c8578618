"""Whether prompts can be shared (`--shared-prompts`): what the model's attention and its other layers must be for it.

A shared row is exact where a token's activations depend on the tokens that it sees and on nothing else, and where
`core_attention` takes sequences of different length that begin with other keys than their own.
"""

from __future__ import annotations

from argparse import Namespace

import torch


def settle_sharing(args: Namespace) -> bool:
    """Whether prompts are shared: as the flag says, else wherever they can be; noted in `args.rl_defaults`.

    Raises ValueError where the flag asks for what cannot be.
    """
    reason = why_not_shared(args) if args.shared_prompts is not False else ""
    if args.shared_prompts and reason:
        raise ValueError(f"--shared-prompts does not work with {reason}, or leave --shared-prompts out")
    if args.shared_prompts is None:
        args.rl_defaults.append(f"--no-shared-prompts (no sharing with {reason})" if reason else "--shared-prompts")
    return args.shared_prompts is not False and not reason


def why_not_shared(args: Namespace) -> str:
    """What stands against it, and what to do instead; "" if nothing does."""
    return next((reason for stands_against, reason in _reasons(args) if stands_against), "")


def _reasons(args: Namespace) -> list[tuple[bool, str]]:
    moe, position = args.num_experts is not None, args.position_embedding_type
    return [
        (
            max(args.hidden_dropout, args.attention_dropout) > 0,
            "dropout, which draws once for a prompt that stands there once: "
            "set --hidden-dropout 0 --attention-dropout 0",
        ),
        (
            position not in ("rope", "yarn", "learned_absolute", "none"),
            f"--position-embedding-type {position}, whose positions are not one number a token: use rope",
        ),
        (
            position == "yarn" and args.apply_rope_fusion,
            "YaRN and fused RoPE, which forgets YaRN's factor in packed rows: set --no-rope-fusion",
        ),
        (bool(args.multi_latent_attention), "--multi-latent-attention: train without sharing"),
        (args.window_size is not None, "--window-size: train without sharing"),
        (
            args.softmax_type != "vanilla",
            f"--softmax-type {args.softmax_type}, which no attention kernel has for packed rows: train without sharing",
        ),
        (
            args.experimental_attention_variant is not None or bool(args.hybrid_layer_pattern or args.is_hybrid_model),
            "layers that are not attention over all that came before: train without sharing",
        ),
        (
            moe and args.moe_expert_capacity_factor is not None,
            "--moe-expert-capacity-factor, which drops tokens by how many there are: leave it out",
        ),
        (
            moe and _balances(args),
            "expert balancing, which without sharing counts a prompt's tokens once a response: "
            "set --moe-router-load-balancing-type none and no --moe-z-loss-coeff or --moe-router-enable-expert-bias",
        ),
        (args.cuda_graph_impl == "transformer_engine", "--cuda-graph-impl transformer_engine: set none"),
        (
            args.transformer_impl == "local" and torch.cuda.is_available(),
            "--transformer-impl local, whose attention on a GPU takes no packed rows: use transformer_engine",
        ),
    ]


def _balances(args: Namespace) -> bool:
    kinds, weights = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    by_order = "sinkhorn" in ([kinds] if isinstance(kinds, str) else kinds)
    by_loss = kinds != "none" and any([weights] if isinstance(weights, float) else weights)
    by_bias = args.moe_router_enable_expert_bias and args.moe_router_bias_update_rate
    return by_order or by_loss or bool(args.moe_z_loss_coeff) or bool(by_bias)
