"""Flags of `longact observe`, `longact stability` and `longact emulate-fp8` beside those of models and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_longact.config import LongActConfig, Scope, Statistic, Tap
from megatron_longact.flags import Flag


@dataclass(frozen=True, kw_only=True)
class ObserveFlags:
    """What is said of the channels."""

    statistic: Statistic = LongActConfig.statistic
    """Statistic of a channel's activation over tokens."""
    ratio: float = LongActConfig.ratio
    """Share of channels whose part of the total is told."""
    output: Path = Path("runs/observe")
    """Folder for results."""
    html: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Everything on one page, too, that can be sent."""


@dataclass(frozen=True, kw_only=True)
class StabilityFlags:
    """What is selected and compared."""

    masks: Annotated[tuple[Path, ...], Flag(metavar="PATH")] = ()
    """Masks of runs: checkpoints or mask files."""
    num_seeds: int = 3
    """Sets of prompts, by seed from --sample-seed on."""
    mixed_seeds: bool = False
    """Each set draws the task of each prompt, as a training on several tasks does, instead of as many of each."""
    hysteresis: tuple[float, ...] = (0.0, 0.1, 0.25)
    """Of three or more sets of prompts or checkpoints: what --longact-hysteresis would do, one after the other."""
    statistic: Statistic = LongActConfig.statistic
    """Statistic of a channel's activation over tokens."""
    tap: Tap = LongActConfig.tap
    """Where activations are read: at the output of `linear_qkv`, or after q/k-layernorm."""
    scope: Scope = LongActConfig.scope
    """Where the top-k is taken."""
    ratio: float = LongActConfig.ratio
    """Share of the rows that are selected."""
    output: Path = Path("runs/stability")
    """Folder for results."""
    html: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Everything on one page, too, that can be sent."""


@dataclass(frozen=True, kw_only=True)
class Fp8Flags:
    """What is emulated."""

    hf_dir: Path
    """A Hugging Face folder."""
    linears: Literal["all", "qkv"] = "all"
    """Linear layers that are in FP8: all of the transformer layers, or linear_qkv alone."""
    ratio: float = LongActConfig.ratio
    """Share of the rows that are selected."""
    output: Path = Path("runs/fp8")
    """Folder for results."""
