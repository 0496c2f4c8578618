"""LongAct done naively, in one process, with nothing of ours: the reference that sharded runs are held against.

Whole activations are kept, sorted in Python; gradients are multiplied by dense 0/1 masks; AdamW is written
out; frozen rows are copied back from a snapshot.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Masks = dict[int, dict[str, Tensor]]


def channels_of_row(np: int, ng: int, hn: int, gate: bool = False) -> list[tuple[str, int]]:
    """For each fused row, which channel it is: ("q" | "gate" | "k" | "v", global channel)."""
    rows: list[tuple[str, int]] = []
    per_group = np // ng
    for group in range(ng):
        for part in ("q", "gate") if gate else ("q",):
            for head in range(group * per_group, (group + 1) * per_group):
                rows += [(part, head * hn + c) for c in range(hn)]
        for part in ("k", "v"):
            rows += [(part, group * hn + c) for c in range(hn)]
    return rows


def saliency(activations: list[Tensor], rows: list[tuple[str, int]], statistic: str) -> dict[str, Tensor]:
    """activations: each [tokens, fused rows], of one layer -> {"q": fp64 [np * hn], "k": fp64 [ng * hn]}."""
    values = torch.cat([a.double() for a in activations]).abs()
    naive = {"mean-abs": values.mean(0), "rms": values.square().mean(0).sqrt(), "max-abs": values.amax(0)}[statistic]
    result = {}
    for part in ("q", "k"):
        index = {channel: row for row, (name, channel) in enumerate(rows) if name == part}
        result[part] = torch.stack([naive[index[channel]] for channel in range(len(index))])
    return result


def gradient_norms(gradient: Tensor, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
    """Root mean square of each row of one layer's gradient [fused rows, h] -> {"q": fp64 [np * hn], "k": ...}."""
    return saliency([gradient.T], rows, "rms")


def top_k(scores: Tensor, ratio: float, lowest: bool = False) -> Tensor:
    """One unit of a scope: fp64 [n] -> bool [n]."""
    count = max(1, math.floor(ratio * len(scores) + 0.5))
    order = sorted(range(len(scores)), key=lambda i: (scores[i].item() if lowest else -scores[i].item(), i))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def masks_of(scores: dict[int, dict[str, Tensor]], *, ratio: float, scope: str, hn: int, lowest: bool = False) -> Masks:
    """Masks of all layers, Q and K apart."""
    masks: Masks = {layer: {} for layer in scores}
    for part in ("q", "k"):
        if scope == "model":
            whole = top_k(torch.cat([scores[layer][part] for layer in sorted(scores)]), ratio, lowest)
            for layer, mask in zip(sorted(scores), whole.chunk(len(scores)), strict=True):
                masks[layer][part] = mask
        for layer in scores if scope != "model" else ():
            units = scores[layer][part].split(hn) if scope == "head" else [scores[layer][part]]
            masks[layer][part] = torch.cat([top_k(unit, ratio, lowest) for unit in units])
    return masks


def row_mask(mask: dict[str, Tensor], rows: list[tuple[str, int]]) -> Tensor:
    """Dense mask over fused rows: fp32 [rows], 1 where the row is updated; V and gate always are."""
    return torch.tensor([float(mask[part][c]) if part in ("q", "k") else 1.0 for part, c in rows])


class AdamW:
    """AdamW as in its paper, one tensor at a time, all in fp32 masters."""

    def __init__(self, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, clip: float) -> None:
        self.lr, self.weight_decay, self.betas, self.eps, self.clip = lr, weight_decay, betas, eps, clip
        self.step_count = 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, masters: dict[str, Tensor], grads: dict[str, Tensor], decays: Callable[[str], bool]) -> float:
        """One step in place; returns the gradient norm before clipping."""
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        factor = min(1.0, self.clip / (norm + 1e-6))
        self.step_count += 1
        for name, master in masters.items():
            grad = grads[name] * factor
            first, second = self.moments.get(name, (torch.zeros_like(master), torch.zeros_like(master)))
            first = self.betas[0] * first + (1 - self.betas[0]) * grad
            second = self.betas[1] * second + (1 - self.betas[1]) * grad * grad
            self.moments[name] = first, second
            unbiased = first / (1 - self.betas[0] ** self.step_count)
            scale = (second / (1 - self.betas[1] ** self.step_count)).sqrt() + self.eps
            if decays(name):
                master *= 1 - self.lr * self.weight_decay
            master -= self.lr * unbiased / scale
        return norm


class SGD:
    """SGD with momentum as torch defines it: weight decay is part of the gradient."""

    def __init__(self, *, lr: float, weight_decay: float, momentum: float, clip: float) -> None:
        self.lr, self.weight_decay, self.momentum, self.clip = lr, weight_decay, momentum, clip
        self.velocity: dict[str, Tensor] = {}

    def step(self, masters: dict[str, Tensor], grads: dict[str, Tensor], decays: Callable[[str], bool]) -> float:
        """One step in place; returns the gradient norm before clipping."""
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        factor = min(1.0, self.clip / (norm + 1e-6))
        for name, master in masters.items():
            grad = grads[name] * factor + (self.weight_decay if decays(name) else 0.0) * master
            self.velocity[name] = self.momentum * self.velocity[name] + grad if name in self.velocity else grad
            master -= self.lr * self.velocity[name]
        return norm


class ActivationLog:
    """Keeps every output of every `linear_qkv` of a model: [tokens, rows], by layer number."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[int, list[Tensor]] = {}
        self.handles = []
        for name, module in model.named_modules():
            if name.endswith("self_attention.linear_qkv"):
                layer = model.get_submodule(name.rpartition(".")[0]).layer_number
                self.handles.append(module.register_forward_hook(self._keep(layer)))

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: tuple[Tensor, object]) -> None:
            if torch.is_grad_enabled():
                self.outputs.setdefault(layer, []).append(output[0].detach().flatten(0, 1))

        return hook
