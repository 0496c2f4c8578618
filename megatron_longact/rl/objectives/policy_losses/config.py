"""The settings of the policy losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_longact.flags import Flag, MegatronFlag
from megatron_longact.rl.objectives.aggregation import Aggregation, check_aggregation


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """How a policy loss clips and averages. Raises ValueError for a value that makes no sense."""

    clip_low: Annotated[float, MegatronFlag("--grpo-clamp-eps-lower")] = 0.2
    """The ratio is clipped below at 1 minus this; 1 or more: never. Not used by kl-cov."""

    clip_high: Annotated[float, MegatronFlag("--grpo-clamp-eps-upper")] = 0.2
    """The ratio is clipped above at 1 plus this; larger than the lower one it is DAPO's clip-higher. Not
    used by kl-cov."""

    dual_clip: float | None = None
    """Bound of the loss for negative advantages, in units of |advantage|, above 1 (arXiv
    1912.09729); grpo and dapo only. Default: off."""

    kl_cov_ratio: float = 0.0002
    """kl-cov: share of the step's tokens, those of largest covariance, that get a KL penalty; one at least."""

    kl_cov_coef: float = 1.0
    """kl-cov: weight of that penalty."""

    clip_cov_ratio: float = 0.0002
    """clip-cov: share of the step's tokens that are left out; one at least, where one qualifies."""

    clip_cov_lower: float = 1.0
    """clip-cov: tokens are left out only where their covariance is larger than this."""

    clip_cov_upper: float = 5.0
    """clip-cov: tokens are left out only where their covariance is smaller than this."""

    aggregation: Annotated[Aggregation, Flag("--loss-aggregation")] = "token-mean"
    """How the tokens' losses become one number. gspo is an objective of responses: it
    always takes seq-mean-token-mean, as in verl."""

    def __post_init__(self) -> None:
        if not (self.clip_low > 0 and self.clip_high > 0):
            raise ValueError(f"clip_low is {self.clip_low} and clip_high is {self.clip_high}; both must be positive")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it must be greater than 1, or None")
        self._check_covariance_settings()
        check_aggregation(self.aggregation)

    def _check_covariance_settings(self) -> None:
        for name in ("kl_cov_ratio", "clip_cov_ratio"):
            if not 0 < (ratio := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {ratio}; it is a share of the tokens, above 0 and at most 1")
        if not self.kl_cov_coef >= 0:
            raise ValueError(f"kl_cov_coef is {self.kl_cov_coef}; it must not be negative")
        if not self.clip_cov_lower < self.clip_cov_upper:
            raise ValueError(
                f"clip_cov_lower is {self.clip_cov_lower} and clip_cov_upper is {self.clip_cov_upper}; "
                "the lower bound must be the smaller one"
            )
