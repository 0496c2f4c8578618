"""What the distributed tests run on each rank: short trainings with LongAct, and the naive reference."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_longact import LongAct, LongActConfig
from megatron_longact.optimizer_shards import chained
from tests import reference
from tests.models import Built, ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
from tests.ranks import Layout


def cpu(masks: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """A detached copy that can leave the rank."""
    return {layer: {part: value.clone() for part, value in parts.items()} for layer, parts in masks.items()}


def masters(built: Built) -> dict[int, Tensor]:
    """A copy of everything that the inner optimizers step on this rank, by identity."""
    tensors = [p for o in chained(built.optimizer) for group in o.optimizer.param_groups for p in group["params"]]
    return {id(tensor): tensor.detach().clone() for tensor in tensors}


def name_all(longact: LongAct) -> Callable[[Tensor], None]:
    """Before each forward: every token counts."""
    return lambda inputs: longact.set_tokens(torch.ones_like(inputs, dtype=torch.bool))


def with_longact(
    spec: ModelSpec | None = None, config: LongActConfig | None = None, optimizer: OptimizerSpec | None = None
) -> tuple[Built, LongAct]:
    built = build(spec or ModelSpec(), optimizer)
    return built, LongAct.attach(built.chunks, built.optimizer, config or LongActConfig())


def take_step(built: Built, longact: LongAct, seed: int = 0, **kwargs: Any) -> bool:
    """On two sequences of random tokens, all of which count; whether Megatron took the step."""
    kwargs.setdefault("before_forward", name_all(longact))
    return train_step(built, random_tokens(2, 32, seed=seed), **kwargs)[0]


def same(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> bool:
    """Masks or scores, by layer and part."""
    return a.keys() == b.keys() and all(torch.equal(a[n][p], b[n][p]) for n in a for p in ("q", "k"))


def num_sequences(optimizer: OptimizerSpec, layout: Layout | None = None) -> int:
    """Two micro-batches a data-parallel rank where a reduction overlaps with them, two rounds of a virtual pipeline."""
    return 4 if optimizer.overlap or (layout and layout.vpp) else 2


def train(
    *,
    spec: ModelSpec,
    optimizer: OptimizerSpec | None = None,
    config: LongActConfig | None = None,
    steps: int = 3,
    sequences: int = 2,
    length: int = 32,
    micro_batch_size: int = 1,
    set_tokens: Callable[[LongAct, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Train from the shared start; `config=None` is without LongAct."""
    built = build(spec, optimizer)
    longact = None if config is None else LongAct.attach(built.chunks, built.optimizer, config)

    def before_forward(inputs: Tensor) -> None:
        if longact is not None:
            (set_tokens or (lambda la, x: name_all(la)(x)))(longact, inputs)

    result: dict[str, Any] = {"start": full_weights(built), "masks": [], "saliency": [], "metrics": [], "norms": []}
    result["weights"] = []
    for step in range(steps):
        tokens = random_tokens(sequences, length, vocab=spec.vocab, seed=step)
        success, norm = train_step(built, tokens, micro_batch_size=micro_batch_size, before_forward=before_forward)
        assert success
        result["norms"].append(norm)
        result["weights"].append(full_weights(built))
        if longact is not None:
            result["masks"].append(cpu(longact.masks))
            result["saliency"].append(cpu(longact.saliency))
            result["metrics"].append(longact.metrics())
    if longact is not None:
        result["state"] = longact.state_dict()
        longact.detach()
    return result


def train_naively(
    *,
    spec: ModelSpec,
    optimizer: OptimizerSpec | None = None,
    config: LongActConfig,
    steps: int = 3,
    sequences: int = 2,
    length: int = 32,
) -> dict[str, Any]:
    """The reference: one process, whole activations, dense masks, AdamW written out; fp32 only."""
    optimizer = optimizer or OptimizerSpec()
    assert torch.distributed.get_world_size() == 1
    assert spec.dtype == "fp32"
    built = build(spec, OptimizerSpec())
    model = built.chunks[0].module
    rows = reference.channels_of_row(
        spec.heads, spec.groups, spec.kv_channels, bool(spec.config.get("attention_output_gate"))
    )
    log = reference.ActivationLog(model)
    inner = naive_optimizer(optimizer)
    parameters = dict(model.named_parameters())
    result: dict[str, Any] = {"masks": [], "saliency": [], "weights": [], "norms": []}
    for step in range(steps):
        log.outputs.clear()
        train_step(built, random_tokens(sequences, length, vocab=spec.vocab, seed=step), step=False)
        if config.select == "gradient":
            names = {n: f"decoder.layers.{n - 1}.self_attention.linear_qkv.weight" for n in log.outputs}
            scores = {n: reference.gradient_norms(parameters[name].main_grad, rows) for n, name in names.items()}
        else:
            scores = {n: reference.saliency(a, rows, config.statistic) for n, a in log.outputs.items()}
        masks = reference.masks_of(
            scores, ratio=config.ratio, scope=config.scope, hn=spec.kv_channels, lowest=config.select == "low"
        )
        grads = {name: p.main_grad.clone() for name, p in parameters.items()}
        frozen = {}
        for layer in masks:
            mask = reference.row_mask(masks[layer], rows)
            for part in ("weight", "bias"):
                name = f"decoder.layers.{layer - 1}.self_attention.linear_qkv.{part}"
                if name in grads:
                    dense = mask.view(-1, *(1,) * (grads[name].dim() - 1)).expand_as(grads[name])
                    grads[name] *= dense
                    frozen[name] = dense == 0
        before = {name: p.detach().clone() for name, p in parameters.items()}
        values = {name: p.data for name, p in parameters.items()}
        norm = inner.step(values, grads, decays=lambda name: parameters[name].dim() > 1)
        for name, where in frozen.items():
            values[name][where] = before[name][where]
        result["masks"].append(masks)
        result["saliency"].append(scores)
        result["norms"].append(norm)
        result["weights"].append({name: value.clone() for name, value in values.items()})
    return result


def naive_optimizer(spec: OptimizerSpec) -> reference.AdamW | reference.SGD:
    """The optimizer of a spec, written out."""
    common = {"lr": spec.lr, "weight_decay": spec.weight_decay, "clip": spec.clip}
    if spec.config.get("optimizer") == "sgd":
        return reference.SGD(**common, momentum=spec.config["sgd_momentum"])
    return reference.AdamW(**common, betas=(0.9, 0.999), eps=spec.eps)


def frozen_rows_stay(
    *, spec: ModelSpec, optimizer: OptimizerSpec, config: LongActConfig, steps: int = 3
) -> dict[str, int]:
    """Count, over steps, frozen elements of masters that changed, and active rows of the model that did not."""
    built = build(spec, optimizer)
    sequences = num_sequences(optimizer)
    longact = LongAct.attach(built.chunks, built.optimizer, config)
    counts = {"frozen": 0, "frozen changed": 0, "model frozen changed": 0, "active": 0, "active same": 0, "owned": 0}
    for step in range(steps):
        before, weights = masters(built), full_weights(built)
        success, _ = train_step(built, random_tokens(sequences, 32, seed=step), before_forward=name_all(longact))
        assert success
        after = full_weights(built)
        for freeze in longact.freezes:
            for shard in freeze.shards:
                counts["owned"] += 1
                old = before[id(shard.inner_parameter)]
                new = shard.inner_parameter.detach()
                for (a, rows), (b, _) in zip(
                    shard.parts(old, longact.step.frozen), shard.parts(new, longact.step.frozen), strict=True
                ):
                    counts["frozen"] += a[rows].numel()
                    counts["frozen changed"] += int((a[rows] != b[rows]).sum())
        for layer, mask in longact.masks.items():
            moves = torch.cat([mask["q"], mask["k"], torch.ones(1, dtype=torch.bool)])  # the last one: V, a gate
            for projection in longact.model.layout.projections:
                active = moves[projection.channels]
                for part in ("weight", "bias"):
                    name = f"decoder.layers.{layer - 1}.self_attention.{projection.name}.{part}"
                    if name in weights:
                        changed = (weights[name] != after[name]).view(len(active), -1)
                        counts["model frozen changed"] += int(changed[~active].sum())
                        counts["active"] += int(active.sum())
                        if part == "weight":  # one bias in bf16 may well round to what it was
                            counts["active same"] += int((~changed[active].any(1)).sum())
    longact.detach()
    return counts


def describe(config: LongActConfig) -> str:
    """A short name of a configuration: what differs from the default."""
    default = asdict(LongActConfig())
    return ",".join(f"{k}={v}" for k, v in asdict(config).items() if v != default[k]) or "default"


def data_parallel_size() -> int:
    """Data-parallel size of the current layout."""
    return int(parallel_state.get_data_parallel_world_size())
