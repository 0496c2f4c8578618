"""The RL program's flags: what they become, and what is refused before anything runs."""

import re
from argparse import ArgumentParser, Namespace
from typing import Any

import pytest

from megatron_longact.rl.arguments import add_rl_args, rl_config_from_args
from megatron_longact.rl.defaults import settle_defaults

MEGATRON = {
    "grpo_prompts_per_step": 8,
    "grpo_group_size": 4,
    "grpo_iterations": 2,
    "grpo_clamp_eps_lower": 0.2,
    "grpo_clamp_eps_upper": 0.28,
    "grpo_kl_beta": 0.01,
    "grpo_entropy_term_weight": 0.0,
    "grpo_filter_groups_with_same_reward": False,
    "rl_default_temperature": 0.9,
    "rl_default_top_p": 0.0,
    "rl_default_top_k": -1,
    "rl_prompts_per_eval": 16,
    "rl_use_sequence_packing": False,
    "rl_sequence_packing_max_sequences_per_bin": 50,
    "rl_inference_logprobs_is_correction": False,
    "rl_importance_sampling_truncation_coef": None,
    "chat_template": None,
    "inference_dynamic_batching": False,
    "cuda_graph_impl": "none",
    "fp8": None,
    "fp8_recipe": "delayed",
    "perform_rl_step": False,
    "global_batch_size": 16,
    "micro_batch_size": 4,
    "seq_length": 272,
    "max_position_embeddings": 1024,
    "seed": 3,
    "sequence_parallel": False,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "hybrid_context_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "cp_comm_type": ["p2p"],
    "virtual_pipeline_model_parallel_size": None,
    "calculate_per_token_loss": False,
    "rampup_batch_size": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "position_embedding_type": "rope",
    "apply_rope_fusion": True,
    "multi_latent_attention": False,
    "window_size": None,
    "softmax_type": "vanilla",
    "experimental_attention_variant": None,
    "hybrid_layer_pattern": None,
    "is_hybrid_model": False,
    "mtp_num_layers": None,
    "num_experts": None,
    "moe_expert_capacity_factor": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 1e-3,
    "transformer_impl": "transformer_engine",
}
"""What Megatron's parser gives for the flags that are read."""

VIRTUAL = {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 2}


def parse(*flags: str, **megatron: Any) -> Namespace:
    ours = ["--run-dir", "runs/x", "--context-lengths", "128", "256", *flags]
    return add_rl_args(ArgumentParser()).parse_args(ours, Namespace(**{**MEGATRON, **megatron}))


def test_flags_become_the_run() -> None:
    config = rl_config_from_args(parse("--dual-clip", "3", "--loss-aggregation", "seq-mean-token-mean"))
    assert config.responses_per_step == 32
    assert config.updates_per_step == 4
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip) == (0.2, 0.28, 3.0)
    assert config.loss.aggregation == "seq-mean-token-mean"
    assert (config.kl_beta, config.kl_estimator) == (0.01, "k3")
    assert (config.sampling.temperature, config.sampling.seed) == (0.9, 3)
    assert config.heldout_context_lengths == (128, 256)
    assert config.normalize_advantages
    assert not rl_config_from_args(parse("--no-advantage-std")).normalize_advantages


def given(*flags: str, **megatron: Any) -> Namespace:
    """Flags through a parser that has Megatron's own defaults, as the program reads them."""
    parser = ArgumentParser(allow_abbrev=False)
    for flag, kind, default in MEGATRONS_OWN:
        parser.add_argument(flag, type=kind, default=default)
    argv = ["--run-dir", "runs/x", *flags]
    args = add_rl_args(parser).parse_args(argv, Namespace(grpo_prompts_per_step=8, seq_length=8192, **megatron))
    settle_defaults(args, argv)
    return args


MEGATRONS_OWN = [
    ("--grpo-clamp-eps-lower", float, 0.01),
    ("--grpo-clamp-eps-upper", float, 0.01),
    ("--grpo-group-size", int, 2),
    ("--grpo-iterations", int, 2),
    ("--micro-batch-size", int, None),
]


def test_what_is_not_given_is_as_the_documents_say() -> None:
    args = given()
    assert (args.grpo_clamp_eps_lower, args.grpo_clamp_eps_upper) == (0.2, 0.28)
    assert (args.grpo_group_size, args.grpo_iterations) == (8, 1)
    assert args.max_response_length == 16  # of needle tasks, whose answers are numbers
    said = " ".join(args.rl_defaults)
    assert "--grpo-clamp-eps-upper 0.28 --grpo-group-size 8 --grpo-iterations 1 --micro-batch-size 1 --max-" in said
    assert given("--train-data", "x.jsonl").max_response_length == 1024
    assert given("--train-data", "x.jsonl", "--max-response-length", "16").max_response_length == 16


def test_what_is_given_stays_also_where_it_is_a_default() -> None:
    own = given("--grpo-clamp-eps-lower", "0.01", "--grpo-clamp-eps-upper=0.01", "--grpo-group-size", "2")
    assert (own.grpo_clamp_eps_lower, own.grpo_clamp_eps_upper, own.grpo_group_size) == (0.01, 0.01, 2)
    assert own.rl_defaults == ["--grpo-iterations 1", "--micro-batch-size 1", "--max-response-length 16"]
    gspo = given("--policy-loss", "gspo")
    assert (gspo.grpo_clamp_eps_lower, gspo.grpo_clamp_eps_upper) == (3e-4, 4e-4)
    wide = given("--policy-loss", "gspo", "--grpo-clamp-eps-lower", "0.2")
    assert (wide.grpo_clamp_eps_lower, wide.grpo_clamp_eps_upper) == (0.2, 4e-4)


def test_one_optimizer_step_a_rollout_batch_if_no_batch_size_is_given() -> None:
    unsaid = {"_is_global_batch_size_explicitly_specified": False, "global_batch_size": 4, "micro_batch_size": 4}
    assert given(**unsaid, data_parallel_size=2).global_batch_size == 64
    with pytest.raises(ValueError, match=r"the 64 responses of a rollout batch do not divide into .* 4 x 3 replicas"):
        given(**unsaid, data_parallel_size=3)
    assert given(_is_global_batch_size_explicitly_specified=True, global_batch_size=4).global_batch_size == 4


def test_sampling_flags_become_the_run() -> None:
    plain = rl_config_from_args(parse())
    assert (plain.dynamic_sampling, plain.sampling_rounds, plain.importance_level) == (False, 1, None)
    flags = ["--importance-sampling-level", "sequence", "--overlong-buffer-length", "4", "--policy-loss", "kl-cov"]
    megatron = {
        "grpo_filter_groups_with_same_reward": True,
        "rl_inference_logprobs_is_correction": True,
        "rl_importance_sampling_truncation_coef": 4.0,
    }
    config = rl_config_from_args(parse(*flags, **megatron))
    assert (config.dynamic_sampling, config.sampling_rounds) == (True, 10)
    assert (config.importance_level, config.importance_threshold) == ("sequence", 4.0)
    assert (config.overlong_buffer_length, config.policy_loss) == (4, "kl-cov")


def test_fp8_needs_scales_of_the_tensor_at_hand() -> None:
    for recipe in ("tensorwise", "blockwise", "mxfp8"):
        rl_config_from_args(parse(fp8="hybrid", fp8_recipe=recipe))
    rl_config_from_args(parse(fp8=None, fp8_recipe="delayed"))  # Megatron's default, without FP8


def test_prompts_are_shared_where_they_can_be() -> None:
    def shared(*flags: str, **megatron: Any) -> tuple[bool | None, str]:
        args = parse(*flags, **megatron)
        return rl_config_from_args(args).shared_prompts, args.rl_defaults[-1]

    assert shared() == (True, "--shared-prompts")
    assert shared(position_embedding_type="learned_absolute")[0]
    assert shared(num_experts=8)[0]
    assert shared(num_experts=8, moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.0)[0]
    assert shared("--no-shared-prompts")[0] is False
    assert shared("--shared-prompts")[0] is True


@pytest.mark.parametrize(
    ("megatron", "said"),
    [
        ({"attention_dropout": 0.1}, "dropout, .*: set --hidden-dropout 0 --attention-dropout 0"),
        ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope, .*: use rope"),
        ({"position_embedding_type": "yarn"}, "YaRN and fused RoPE, .*: set --no-rope-fusion"),
        ({"window_size": (128, 0)}, "--window-size: train without sharing"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"is_hybrid_model": True}, "layers that are not attention"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"num_experts": 8, "moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor, .*: leave it out"),
        ({"num_experts": 8, "moe_aux_loss_coeff": 0.01}, "expert balancing, .*: set --moe-router-load-balancing-type"),
        ({"num_experts": 8, "moe_router_load_balancing_type": ["sinkhorn"]}, "expert balancing"),
        ({"num_experts": 8, "moe_router_enable_expert_bias": True}, "expert balancing"),
        ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl transformer_engine: set none"),
    ],
)
def test_what_cannot_share_prompts_says_why(megatron: dict[str, Any], said: str) -> None:
    args = parse(**megatron)
    assert rl_config_from_args(args).shared_prompts is False
    assert re.match(rf"--no-shared-prompts \(no sharing with {said}", args.rl_defaults[-1])
    with pytest.raises(ValueError, match=f"--shared-prompts does not work with {said}"):
        rl_config_from_args(parse("--shared-prompts", **megatron))


def test_kl_cov_with_one_step_a_batch_is_remarked_on() -> None:
    assert rl_config_from_args(parse("--policy-loss", "kl-cov")).remarks == []
    one = rl_config_from_args(parse("--policy-loss", "kl-cov", grpo_iterations=1, global_batch_size=32))
    assert "penalty is zero" in one.remarks[0]


@pytest.mark.parametrize(
    ("flags", "megatron", "said"),
    [
        ((), {"seq_length": 271}, "needs 272 positions"),
        ((), {"seq_length": 2048}, "max-position-embeddings 1024"),
        (("--max-response-length", "17"), {}, "needs 273 positions"),
        (("--heldout-context-lengths", "512"), {}, "context of 512 tokens"),
        (("--context-lengths", "0"), {}, "at least 1"),
        ((), {"global_batch_size": 24}, "do not divide"),
        ((), {"grpo_group_size": 1}, "grpo-group-size is 1"),
        ((), {"grpo_iterations": 0}, "grpo-iterations is 0"),
        ((), {"train_iters": 4, "lr_warmup_iters": 4}, "--lr-warmup-iters is 4, and .* ends at iteration 4"),
        ((), {"rl_prompts_per_eval": 0}, "rl-prompts-per-eval is 0"),
        ((), {"grpo_kl_beta": -0.1}, "grpo-kl-beta is -0.1"),
        ((), {"grpo_clamp_eps_lower": -0.1}, "clip_low is -0.1"),
        ((), {"rl_default_temperature": 0.0}, "temperature is 0.0"),
        (("--dual-clip", "0.5"), {}, "dual_clip is 0.5"),
        ((), {"perform_rl_step": True}, "--perform-rl-step"),
        ((), {"sequence_parallel": True, "tensor_model_parallel_size": 3}, "cut rows into 3 equal parts"),
        ((), {"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
        ((), {"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        (
            (),
            {"inference_dynamic_batching": True, "expert_model_parallel_size": 2},
            "--expert-model-parallel-size and --inference-dynamic-batching",
        ),
        ((), {"mtp_num_layers": 1}, "--mtp-num-layers: layers that predict further tokens"),
        (
            ("--no-shared-prompts",),
            {"context_parallel_size": 2, "rl_use_sequence_packing": True, "cp_comm_type": ["all_gather"]},
            "--cp-comm-type is all_gather; for packed rows",
        ),
        ((), {"context_parallel_size": 3}, "cut rows into 6 equal parts"),
        ((), VIRTUAL | {"inference_dynamic_batching": True}, "--num-layers-per-virtual-pipeline-stage and"),
        (
            ("--no-shared-prompts",),
            VIRTUAL | {"micro_batch_size": 3},
            "wants a multiple of 12: 3 responses a micro-batch x 2 replicas x 2",
        ),
        ((), VIRTUAL | {"pipeline_model_parallel_size": 3, "rl_use_sequence_packing": True}, "a multiple of 6: 1"),
        ((), {"calculate_per_token_loss": True}, "--calculate-per-token-loss"),
        ((), {"grpo_entropy_term_weight": 0.1}, "--grpo-entropy-term-weight"),
        ((), {"fp8": "hybrid"}, "--fp8-recipe delayed: the rollouts after its first step"),
        ((), {"rl_sequence_packing_max_sequences_per_bin": 0}, "max-sequences-per-bin is 0"),
        (("--overlong-buffer-length", "17"), {}, "buffer_length is 17"),
        (("--logits-chunk-size", "0"), {}, "logits-chunk-size is 0"),
        (("--max-sampling-rounds", "0"), {"grpo_filter_groups_with_same_reward": True}, "max-sampling-rounds is 0"),
        ((), {"rl_importance_sampling_truncation_coef": -1.0}, "truncation-coef is -1.0"),
        (("--kl-cov-ratio", "0"), {}, "kl_cov_ratio is 0"),
        (("--train-data", "nowhere.jsonl"), {}, "no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags: tuple[str, ...], megatron: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        rl_config_from_args(parse(*flags, **megatron))
    assert "\n" not in str(caught.value)
