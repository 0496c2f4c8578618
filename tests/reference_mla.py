"""`tests/reference.py` for multi-latent attention: which row is which channel, written out, with nothing of ours."""

import torch
from torch import Tensor

from megatron_longact import LongActConfig
from tests import reference

Rows = dict[str, list[tuple[str, int]]]


def channels_of_rows(np: int, dn: int, dr: int, dv: int, q_latent: int | None, kv_latent: int) -> Rows:
    """For each row of each weight which channel it is: ("q" | "k" | "k_rope" | "v" | "latent", number)."""
    q = [("q", head * (dn + dr) + c) for head in range(np) for c in range(dn + dr)]
    up, down = [], [("latent", c) for c in range(kv_latent)] + [("k_rope", c) for c in range(dr)]
    for head in range(np):
        up += [("k", head * dn + c) for c in range(dn)] + [("v", head * dv + c) for c in range(dv)]
    q_name = "linear_q_proj" if q_latent is None else "linear_q_up_proj"
    return {q_name: q, "linear_kv_up_proj": up, "linear_kv_down_proj": down}


def saliency(activations: dict[str, list[Tensor]], rows: Rows, config: LongActConfig) -> dict[str, Tensor]:
    """Of one layer, what each weight put out, each [tokens, rows] -> fp64 of the channels "q", "k" and "k_rope"."""
    statistic = "rms" if config.select == "gradient" else config.statistic
    found: dict[str, dict[int, Tensor]] = {"q": {}, "k": {}, "k_rope": {}}
    for name, of in rows.items():
        values = torch.cat([a.double() for a in activations[name]]).abs()
        naive = {"mean-abs": values.mean(0), "rms": values.square().mean(0).sqrt(), "max-abs": values.amax(0)}
        for row, (part, channel) in enumerate(of):
            if part in found:
                found[part][channel] = naive[statistic][row]
    return {part: torch.stack([of[channel] for channel in range(len(of))]) for part, of in found.items()}


def masks_of(
    scores: dict[int, dict[str, Tensor]], config: LongActConfig, *, widths: dict[str, int]
) -> dict[int, dict[str, Tensor]]:
    """Masks of all layers: Q, what each head of K has of its own, and what its heads share, each ranked by itself."""
    masks: dict[int, dict[str, Tensor]] = {layer: {} for layer in scores}
    for part, width in widths.items():
        alone = {layer: {"q": of[part], "k": of[part]} for layer, of in scores.items()}
        ranked = reference.masks_of(alone, ratio=config.ratio, scope=config.scope, hn=width)
        for layer, mask in ranked.items():
            masks[layer][part] = mask["q"] if part[0] in config.targets else torch.ones_like(mask["q"])
    return masks


def row_masks(mask: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Dense masks over the rows of each weight: fp32, 1 where the row is updated; V and latents always are."""
    return {
        name: torch.tensor([float(mask[part][channel]) if part in mask else 1.0 for part, channel in of])
        for name, of in rows.items()
    }
