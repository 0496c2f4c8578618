"""Multi-latent attention in Hugging Face's files: the order of rows, masks, what changed, and what is observed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_longact import LongActConfig
from megatron_longact.analysis.activations import hf
from megatron_longact.analysis.activations.measurement import measure
from megatron_longact.analysis.observe import plots
from megatron_longact.analysis.observe.observation import Observation
from megatron_longact.analysis.observe.outliers import RopeFrequencies
from megatron_longact.analysis.observe.report import report
from megatron_longact.analysis.stability.masks import read_choices
from megatron_longact.conversion import masks
from megatron_longact.conversion.audit import audit
from megatron_longact.imported_masks import read_masks
from tests import ranks
from tests.models import build
from tests.runs import train
from tests.test_mla import HF_NAMES, Q_LATENT, layout_of

MODULES = {
    **HF_NAMES,
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "kv_layernorm": "kv_a_layernorm",
    "linear_proj": "o_proj",
}
"""Megatron's, and Hugging Face's."""


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of `transformers`' DeepSeek-V3, its MLPs dense."""
    config = transformers.DeepseekV3Config(
        hidden_size=Q_LATENT.hidden, num_attention_heads=Q_LATENT.heads, num_key_value_heads=Q_LATENT.heads,
        num_hidden_layers=2, first_k_dense_replace=2, intermediate_size=48, vocab_size=64, max_position_embeddings=64,
        q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deepseek")
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


def megatron_attention() -> dict[str, Any]:
    """What Megatron's attention makes of a hidden state, and its weights by Hugging Face's names."""
    built = build(Q_LATENT)
    attention = built.chunks[0].module.decoder.layers[0].self_attention
    hidden = torch.randn(16, 1, Q_LATENT.hidden, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    with torch.no_grad():
        output = attention(hidden, mask)[0]
    weights = {f"{theirs}.weight": getattr(attention, ours).weight.detach().clone() for ours, theirs in MODULES.items()}
    return {"hidden": hidden, "output": output, "weights": weights}


def test_rows_of_checkpoints_are_in_the_order_of_megatrons(deepseek: Path) -> None:
    """With the same rows in the same order Megatron's attention is that of `transformers`, RoPE and all.

    Without `rope_interleave` the channels of a pair are half of the RoPE channels apart.
    """
    [ours] = ranks.run(megatron_attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(deepseek, attn_implementation="eager").model
    attention = model.layers[0].self_attn
    attention.load_state_dict(ours["weights"])
    for norm in (attention.q_a_layernorm, attention.kv_a_layernorm):
        norm.variance_epsilon = 1e-5  # Megatron's is that of all norms; here it is 1e-6 whatever the configuration says
    hidden = ours["hidden"].transpose(0, 1)
    mask = torch.full((1, 1, 16, 16), -torch.inf).triu(1)

    def output() -> torch.Tensor:
        with torch.no_grad():
            return attention(hidden, model.rotary_emb(hidden, torch.arange(16)[None]), mask)[0].transpose(0, 1)

    torch.testing.assert_close(output(), ours["output"], rtol=0, atol=1e-5)
    attention.config.rope_interleave = False
    assert (output() - ours["output"]).abs().max() > 1e-2
    apart = torch.tensor([0, 2, 1, 3])  # the first of each pair, then the second
    q, kv = (attention.get_parameter(f"{name}.weight").data for name in ("q_b_proj", "kv_a_proj_with_mqa"))
    q.view(4, 12, -1)[:, 8:] = q.view(4, 12, -1)[:, 8:][:, apart]
    kv[16:] = kv[16:][apart]
    torch.testing.assert_close(output(), ours["output"], rtol=0, atol=1e-5)


def test_masks_go_out_and_come_back_under_the_names_of_checkpoints(deepseek: Path, tmp_path: Path) -> None:
    state = ranks.run(train, spec=Q_LATENT, config=LongActConfig(), steps=1)[0]["state"]
    layout = layout_of(Q_LATENT)
    tensors, path = dict(masks.tensors(state)), tmp_path / "mask.safetensors"
    save_file(tensors, path)
    read = read_masks(path, layout, state["layer_numbers"])
    assert torch.equal(read.q, state["masks"]["q"])
    assert torch.equal(read.k, state["masks"]["k"])
    old = load_file(deepseek / "model.safetensors")
    for name, mask in tensors.items():
        of_values = name.endswith("kv_b_proj")
        assert len(mask) == len(old[f"{name.removesuffix('.saliency')}.weight"])
        assert not of_values or mask.view(4, 14)[:, 8:].all()

    shutil.copytree(deepseek, tmp_path / "after")
    name = "model.layers.1.self_attn.kv_b_proj"
    frozen = (~tensors[name]).nonzero().flatten()
    old[f"{name}.weight"][[int(frozen[0]), 13]] += 1  # the other one is V
    save_file(old, tmp_path / "after" / "model.safetensors", metadata={"format": "pt"})
    found = audit(deepseek, tmp_path / "after", mask=path)
    assert (found.changed_outside, found.changed_inside) == (1, 1)
    assert sum(change.masked for change in found.changes) == 6

    save_file(tensors, path, metadata=masks.metadata(state))
    [choice], numbers = read_choices([path])
    assert torch.equal(choice.masks.k, state["masks"]["k"])
    assert numbers == (0, 1)

    only_q = {name: mask for name, mask in tensors.items() if "kv_" not in name}
    save_file(only_q, path)
    assert read_masks(path, layout, state["layer_numbers"], "q").k.all()
    with pytest.raises(ValueError, match=r"has no model.layers.0.self_attn.kv_a_proj_with_mqa, model.layers.0"):
        read_masks(path, layout, state["layer_numbers"])
    tensors[name][13] = False
    save_file(tensors, path)
    with pytest.raises(ValueError, match="kv_b_proj freezes 1 rows that make no channel of Q or K"):
        read_masks(path, layout, state["layer_numbers"])


def test_a_folder_is_observed(deepseek: Path, tmp_path: Path) -> None:
    source = hf.open_folder(deepseek)
    assert source.layout == layout_of(Q_LATENT)
    seen: list[torch.Tensor] = []
    attention = source.model.model.layers[1].self_attn
    attention.kv_a_proj_with_mqa.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    measured = measure(source, [[1, 2, 3, 4], [5, 6, 7]])
    values = measured.channel_values("projection", "mean-abs", source.layout)[1]
    assert {part: len(of) for part, of in values.items()} == {"q": 48, "k": 32, "k-rope": 4}
    torch.testing.assert_close(values["k-rope"], torch.cat(seen).abs().mean(0)[16:])
    rope = RopeFrequencies(source.inv_freq, source.rope_interleaved)
    observation = Observation("tiny", source.layout, rope, {None: measured}, "mean-abs", 0.3)
    assert "1 K-ROPE" in report(observation)
    assert {len(parts) for parts in observation.rope_profiles("projection").values()} == {2}
    plots.write(observation, tmp_path)
