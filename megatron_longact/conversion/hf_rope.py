"""How a config.json turns queries and keys."""

import json
from dataclasses import dataclass
from math import log

from megatron_longact.conversion.config_reader import ConfigReader

_YARN = """
    factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale mscale_all_dim truncate
"""
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071), in Megatron's terms.

    cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where m(x) = 1 + 0.1 x ln(factor).
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    """Whether the ramp between the frequencies begins and ends at whole ones."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how it is scaled."""

    theta: float = 10000.0
    llama3_factor: float | None = None
    """Llama 3.1's scaling, with the other constants of it as Megatron has them built in."""
    linear_factor: int | None = None
    yarn: Yarn | None = None
    share: float = 1.0
    """Share of a head's channels that are turned, the first ones."""


def rope_of(reader: ConfigReader, *, default_share: float) -> Rope:
    """Old files have `rope_theta` and `rope_scaling`, newer ones `rope_parameters` with both.

    default_share: `Rope.share` where the file does not say; 1 is the only one of families that have it 1. Raises
    `ValueError` for a scaling that Megatron does not have.
    """
    parameters = reader.config.get("rope_parameters") or {}
    scaling = {**(reader.config.get("rope_scaling") or {}), **parameters}
    theta = scaling.pop("rope_theta", None) or reader.config.get("rope_theta") or 10000.0
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    share = scaling.pop("partial_rotary_factor", None) or reader.config.get("partial_rotary_factor") or default_share
    if default_share == 1 != share:
        reader.refuse("partial_rotary_factor", share, "1 would work")
    if not isinstance(theta, int | float):
        raise ValueError(f"{reader.where}: rope_theta is {json.dumps(theta)}; it must be a number")
    if kind == "default" and not any(scaling.values()):
        return Rope(float(theta), share=float(share))
    if share != 1:
        reader.refuse("partial_rotary_factor", share, "with it RoPE that is not scaled would work")
    if kind == "llama3" and scaling | {"factor": 8.0} == _LLAMA3:
        return Rope(float(theta), llama3_factor=float(scaling["factor"]))
    if kind == "linear" and set(scaling) == {"factor"} and float(scaling["factor"]).is_integer():
        return Rope(float(theta), linear_factor=int(scaling["factor"]))
    if kind == "yarn" and "factor" in scaling and set(_YARN.split()).issuperset(scaling):
        yarn = _yarn(ConfigReader(scaling, reader.where), reader.size("max_position_embeddings"))
        return Rope(float(theta), yarn=yarn)
    reader.refuse(
        "rope_parameters" if parameters else "rope_scaling",
        {"rope_type": kind, **scaling},
        "default, yarn, linear by a whole factor, and llama3 with low 1, high 4 and 8192 original positions would work",
    )


def _yarn(scaling: ConfigReader, positions: int) -> Yarn:
    """As `transformers` reads it; Megatron has no attention factor, but an mscale that makes the same of it."""
    original = scaling.size("original_max_position_embeddings", positions)
    factor = scaling.number("factor", positions / original)
    mscale, all_dim = scaling.number("mscale", 0), scaling.number("mscale_all_dim", 0)
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0
    attention = scaling.config.get("attention_factor")
    if factor < 1 or (factor == 1 and attention not in (None, 1)):
        scaling.refuse("factor", factor, "more than 1 would work")
    if factor > 1 and attention is not None:
        mscale, all_dim = (scaling.number("attention_factor") - 1) / (0.1 * log(factor)), 0.0
    return Yarn(
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0) or 1.0,
        mscale=mscale,
        mscale_all_dim=all_dim,
        truncate=bool(scaling.config.get("truncate", True)),
    )
