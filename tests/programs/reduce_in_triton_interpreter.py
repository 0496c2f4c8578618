"""Compares the Triton kernel with fp64, in Triton's interpreter on the CPU; prints relative errors as JSON."""

import itertools
import json
from functools import partial

import torch

from megatron_longact.reduction import STATISTICS
from megatron_longact.reduction_triton import reduce
from tests.test_reduction import naive


def main() -> None:
    """All statistics, all kinds of weights, on views as Q and K lie in the output of linear_qkv."""
    of = {name: partial(reduce, power=s.power, maximum=s.maximum) for name, s in STATISTICS.items()}
    errors = {}
    for tokens, (runs, width) in itertools.product((1, 33, 300), ((2, 40), (3, 128))):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, runs * (width + 8), generator=generator).bfloat16()
        x = x.unflatten(1, (runs, width + 8))[..., :width]
        keep = torch.rand(tokens, generator=generator) < 0.7
        keep[0] = True
        often = (keep * torch.randint(1, 9, (tokens,), generator=generator)).float()
        noisy = torch.where(keep[:, None, None], x, float("nan"))
        kinds = {"all": (x, None), "masked": (noisy, keep), "weighted": (noisy, often)}
        for statistic, (kind, (given, weights)) in itertools.product(STATISTICS, kinds.items()):
            found, wanted = of[statistic](given, weights).double(), naive(given, weights, statistic)
            errors[f"{tokens} {runs}x{width} {statistic} {kind}"] = float(((found - wanted) / wanted).abs().max())
    bad = torch.ones(40, 1, 8)
    bad[35, 0, 3], bad[2, 0, 5] = float("nan"), float("inf")
    finite = {statistic: of[statistic](bad, None)[0].isfinite().tolist() for statistic in STATISTICS}
    print(json.dumps({"errors": errors, "finite": finite}))


if __name__ == "__main__":
    main()
