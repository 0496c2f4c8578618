"""What test_verl runs on each rank: verl's own engine on a tiny Qwen3, with LongAct attached by `model.external_lib`.

What stands in for a GPU is in `verl_in_cpu_mode`.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_longact import LongAct
from tests.launch import ROOT
from tests.trainers.bridge_on_cpu import CPU_SETTINGS

PROMPT, RESPONSE, SEQUENCES, VOCABULARY = 12, 8, 8, 64
HF = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def save_model(folder: Path) -> None:
    """A Qwen3 with random weights and a tokenizer, as `transformers` saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**HF)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_engine(model: Path, *, model_type: str = "language_model") -> Any:
    """The engine as verl's worker makes it from its configuration, at TP 2."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine import EngineRegistry

    sys.path.append(str(ROOT / "examples" / "integrations"))
    model_config = HFModelConfig(
        path=str(model),
        model_type=model_type,
        external_lib="verl_engine",
        override_config={"attn_implementation": "eager"},
    )
    engine = EngineRegistry.new(
        model_type=model_type,
        backend="megatron",
        model_config=model_config,
        engine_config=McoreEngineConfig(
            tensor_model_parallel_size=2,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=4,
            override_transformer_config=CPU_SETTINGS,
        ),
        optimizer_config=McoreOptimizerConfig(
            lr=1e-2, weight_decay=0.1, total_training_steps=10, use_checkpoint_opt_param_scheduler=True
        ),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def batch(seed: int) -> Any:
    """Prompts and responses of a step, as the trainer gives them to an actor's update."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, PROMPT + RESPONSE), generator=generator)
    attention = torch.ones_like(ids)
    attention[::2, :3] = 0  # left padding of prompts
    attention[1::2, -2:] = 0  # shorter responses
    response_mask = attention[:, PROMPT:]
    data = tensordict_utils.get_tensordict(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "response_mask": response_mask,
            "old_log_probs": torch.full((SEQUENCES, RESPONSE), -4.0),
            "advantages": torch.randn(SEQUENCES, 1, generator=generator).expand(-1, RESPONSE) * response_mask,
            "temperature": torch.ones(SEQUENCES),
        },
        {
            "global_batch_size": SEQUENCES,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": 4,
            "calculate_entropy": False,
        },
    )
    return left_right_2_no_padding(data)


def loss() -> Any:
    """The PPO loss of verl, with GRPO's advantages in the batch."""
    from verl.workers.config import McoreActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = McoreActorConfig(
        ppo_mini_batch_size=SEQUENCES, ppo_micro_batch_size_per_gpu=4, use_dynamic_bsz=False, rollout_n=1
    )
    return partial(ppo_loss, config=config)


def train(engine: Any, *, seed: int) -> float:
    """One update as verl's worker makes it; the gradient's norm, 0 where this rank is not told."""
    with engine.train_mode():
        output = engine.train_batch(batch(seed), loss_function=loss())
    engine.lr_scheduler_step()
    return float(output["metrics"]["grad_norm"]) if engine.is_mp_src_rank_with_outputs() else 0.0


def weights(engine: Any) -> dict[str, Tensor]:
    """Everything that verl sends an inference engine at first, under Hugging Face names."""
    parameters, _ = engine.get_per_tensor_param()
    return {name: value.detach().clone() for name, value in parameters}


def delta(engine: Any) -> dict[str, list[int]]:
    """Rows of which verl's own delta export has an element, since it was asked before, by this rank."""
    rows = {}
    entries, _ = engine.get_per_tensor_param_delta_shard()
    for slots, _, counts, indices, _, _ in entries:
        for (name, shape), part in zip(slots, indices.split(counts.tolist()), strict=True):
            rows[name] = (part // (shape[1] if len(shape) > 1 else 1)).unique().tolist()
    return rows


def run(*, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint, a third; and another engine that goes on from the checkpoint."""
    from tests.trainers import verl_in_cpu_mode  # noqa: F401

    if torch.distributed.get_rank() == 0:
        save_model(folder / "model")
    torch.distributed.barrier()
    engine = make_engine(folder / "model")
    longact = LongAct.of(engine.optimizer)
    assert longact is not None
    engine.prime_delta_snapshots()
    exported, norms, masks, deltas = [weights(engine)], [], [], []
    for update in range(3):
        if update == 2:
            engine.save_checkpoint(str(folder / "checkpoint"), global_step=2)
        norms.append(train(engine, seed=update))
        masks.append(longact.state_dict()["masks"])
        exported.append(weights(engine))
        deltas.append(delta(engine))
    frozen = [longact.frozen_rows_by_hf_name(since=since) for since in range(3)]
    resumed = make_engine(folder / "model")
    other = LongAct.of(resumed.optimizer)
    assert other is not None
    resumed.load_checkpoint(str(folder / "checkpoint"))
    loaded = {"state": other.state_dict(), "weights": weights(resumed)}
    train(resumed, seed=2)
    return {
        "norms": norms,
        "masks": masks,
        "exported": exported,
        "deltas": deltas,
        "frozen": frozen,
        "state": longact.state_dict(),
        "loaded": loaded,
        "resumed": {"state": other.state_dict(), "weights": weights(resumed)},
    }


def critic(*, folder: Path) -> bool:
    """Whether verl's critic is left alone."""
    from tests.trainers import verl_in_cpu_mode  # noqa: F401

    return LongAct.of(make_engine(folder / "model", model_type="value_model").optimizer) is None
