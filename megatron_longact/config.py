"""The configuration of LongAct: one frozen dataclass, checked once."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args, get_origin, get_type_hints

Select = Literal["high", "low", "random", "weight-norm", "gradient"]
Statistic = Literal["mean-abs", "rms", "max-abs"]
Tap = Literal["projection", "norm"]
Scope = Literal["layer", "head", "model"]
Targets = Literal["qk", "q", "k"]
Freeze = Literal["strict", "grad-only"]
Moments = Literal["decay", "hold", "reset"]
OnMismatch = Literal["error", "use-flags"]

PREFIX = "--longact-"
"""Of the flags of `LongActConfig`."""


@dataclass(frozen=True, kw_only=True)
class LongActConfig:
    """What LongAct selects, when, and how firmly it holds the rest.

    The docstring under a field is the help of its `--longact-*` flag. Raises `ValueError` on a value that
    makes no sense, with the value and what would work.
    """

    ratio: float = 0.30
    """Share of the Q rows, and of the K rows, that are updated; in (0, 1]."""

    select: Select = "high"
    """Which channels are salient: the highest saliency, the lowest, a random set, the largest row norm of the
    weight, or of its gradient, accumulated over the step. The last four are ablations."""

    statistic: Statistic = "mean-abs"
    """Statistic of a channel's activation over tokens, accumulated in fp32."""

    tap: Tap = "projection"
    """Where activations are read: at the output of `linear_qkv` (with multi-latent attention of what is there in its
    place), or after q/k-layernorm; always before RoPE."""

    scope: Scope = "layer"
    """Where the top-k is taken: in each layer, in each head, or over the whole model. Q and K are ranked
    apart."""

    targets: Targets = "qk"
    """Which projections are masked; the other one trains densely. With multi-latent attention q is linear_q_up_proj, or
    linear_q_proj, and k the K rows of linear_kv_up_proj with the RoPE rows of linear_kv_down_proj."""

    refresh_interval: int = 1
    """Optimizer steps between two selections; 0 selects at the first masked step and keeps that mask."""

    ema: float = 0.0
    """Smoothing of the saliency over refreshes: weight of the old value, in [0, 1)."""

    hysteresis: float = 0.0
    """A row leaves the mask only when its rank lies behind the last selected one by more than this share of the
    selected rows; 0 keeps no row that others outrank. As many rows are selected either way."""

    warmup_steps: int = 0
    """Dense updates before the first mask."""

    min_context: int = 0
    """Only sequences of at least this many tokens are counted."""

    skip_first_tokens: int = 0
    """Leave this many tokens at the start of each sequence (attention sinks) out of the statistic."""

    freeze: Freeze = "strict"
    """strict keeps frozen rows bit-identical through weight decay and momentum; grad-only masks the gradient
    and nothing else."""

    seed: int = 1234
    """Seed of the random selector."""

    moments: Moments = "decay"
    """What the optimizer moments of a frozen row do: decay (they see a zero gradient), hold, or reset to
    zero."""

    import_mask: str = ""
    """Start from the masks in this safetensors file, as `longact export-mask` writes it, instead of a first selection.
    With a refresh interval of 0 they stay for the whole run; with another one they hold until the first refresh, one
    interval after the first masked step. A run that resumes goes on with the masks of its checkpoint."""

    on_mismatch: OnMismatch = "error"
    """A checkpoint made with another LongAct configuration: stop, or go on with the flags given now. If those choose
    other rows, the masks of the checkpoint are dropped, and the next step selects anew; scores of another kind are not
    smoothed with."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            self._check_choice(name, hint)
        self._check_range("ratio", "a share in (0, 1]", 0 < self.ratio <= 1)
        self._check_range("ema", "a weight in [0, 1)", 0 <= self.ema < 1)
        self._check_range("hysteresis", "a share, 0 or more", self.hysteresis >= 0)
        for name in (
            "refresh_interval",
            "warmup_steps",
            "min_context",
            "skip_first_tokens",
            "seed",
        ):
            self._check_range(name, "a whole number, 0 or more", getattr(self, name) >= 0)

    def _check_choice(self, name: str, hint: type) -> None:
        value = getattr(self, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(get_args(hint))
            raise ValueError(f"{flag(name)} is {value!r}; it must be one of: {choices}")
        if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{flag(name)} is {value!r}; it must be a whole number")
        if hint is float and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{flag(name)} is {value!r}; it must be a number")
        if hint is float and not isfinite(value):
            raise ValueError(f"{flag(name)} is {value!r}; it must be finite")

    def _check_range(self, name: str, wanted: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{flag(name)} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def reads_activations(self) -> bool:
        """Whether the selection depends on activations at all."""
        return self.select in ("high", "low")

    @property
    def smooths_saliency(self) -> bool:
        """Whether the saliency is averaged over refreshes; random scores are not."""
        return self.ema > 0 and self.select != "random"


def flag(name: str) -> str:
    """The command-line flag of a field of `LongActConfig`."""
    return PREFIX + name.replace("_", "-")
