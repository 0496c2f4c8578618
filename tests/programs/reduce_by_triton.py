"""Compares the Triton kernel with fp64, in Triton's interpreter on the CPU; prints relative errors as JSON."""

import itertools
import json

import torch

from megatron_longact.saliency_triton import reduce_by_triton


def main() -> None:
    """All statistics, masked or not, on views as Q and K lie in the output of linear_qkv."""
    errors = {}
    for tokens, (runs, width) in itertools.product((1, 33, 300), ((2, 40), (3, 128))):
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, runs * (width + 8), generator=generator).bfloat16()
        x = x.unflatten(1, (runs, width + 8))[..., :width]
        keep = torch.rand(tokens, generator=generator) < 0.7
        keep[0] = True
        noisy = torch.where(keep[:, None, None], x, float("nan"))
        views = {None: (x, None), "masked": (noisy, keep)}
        for statistic, (name, (given, counted)) in itertools.product(("mean-abs", "rms", "max-abs"), views.items()):
            values = (x if counted is None else x[counted]).double().abs()
            wanted = {"mean-abs": values.sum, "rms": values.square().sum, "max-abs": values.amax}[statistic](0)
            found = reduce_by_triton(given, counted, statistic=statistic).double()
            errors[f"{tokens} {runs}x{width} {statistic} {name}"] = float(((found - wanted) / wanted).abs().max())
    bad = torch.ones(40, 1, 8)
    bad[35, 0, 3], bad[2, 0, 5] = float("nan"), float("inf")
    finite = {
        s: reduce_by_triton(bad, None, statistic=s)[0].isfinite().tolist() for s in ("mean-abs", "rms", "max-abs")
    }
    print(json.dumps({"errors": errors, "finite": finite}))


if __name__ == "__main__":
    main()
