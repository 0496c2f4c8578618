"""The top-k: exact counts, ties, scopes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_longact import LongActConfig, QKVLayout, select_salient_channels
from megatron_longact.selection import QK, num_selected, random_saliency, select_masks


def naive_top_k(scores: list[float], count: int, lowest: bool) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (scores[i] if lowest else -scores[i], i))
    return [i in order[:count] for i in range(len(scores))]


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, -1.0]), min_size=1, max_size=40),
    st.integers(1, 100).map(lambda n: n / 100),
    st.sampled_from(["high", "low"]),
)
def test_top_k_with_many_ties(scores: list[float], ratio: float, select: str) -> None:
    mask = select_salient_channels(torch.tensor(scores), ratio=ratio, select=select)
    assert mask.tolist() == naive_top_k(scores, num_selected(ratio, len(scores)), select == "low")


@given(st.integers(1, 10_000), st.integers(1, 1000).map(lambda n: n / 1000))
def test_count_is_rounded_in_exact_decimal(n: int, ratio: float) -> None:
    exact = Fraction(str(ratio)) * n + Fraction(1, 2)
    assert num_selected(ratio, n) == max(1, exact.numerator // exact.denominator)


def test_count_where_binary_floats_err() -> None:
    assert num_selected(0.15, 10) == 2  # 1.5 + 0.5; in binary 0.15 is a little less
    assert num_selected(0.3, 5) == 2
    assert num_selected(0.001, 8) == 1
    assert num_selected(1.0, 8) == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        select_salient_channels(torch.tensor([1.0, bad]), ratio=0.5)


@pytest.mark.parametrize("ratio", [0.0, 1.01, -1.0])
def test_ratio_must_be_a_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="share in"):
        select_salient_channels(torch.ones(3), ratio=ratio)


LAYOUT = QKVLayout(4, 2, 10)


def masks(saliency: QK, **config: str) -> QK:
    return select_masks(saliency, layout=LAYOUT, config=LongActConfig(**config))


def test_scopes_count_in_their_units() -> None:
    generator = torch.Generator().manual_seed(0)
    saliency = QK(torch.rand(3, 40, generator=generator), torch.rand(3, 20, generator=generator))
    saliency.q[0] += 10  # the model scope takes all of layer 0 first
    per_layer, per_head, per_model = (masks(saliency, scope=scope) for scope in ("layer", "head", "model"))
    assert per_layer.q.sum(1).tolist() == [12] * 3
    assert per_layer.k.sum(1).tolist() == [6] * 3
    assert per_head.q.view(3, 4, 10).sum(2).eq(3).all()
    assert per_head.k.view(3, 2, 10).sum(2).eq(3).all()
    assert per_model.q.sum() == 36
    assert per_model.q.sum(1).tolist() == [36, 0, 0]
    assert per_model.k.sum() == 18


def test_low_is_not_high() -> None:
    saliency = QK(torch.arange(40.0)[None], torch.arange(20.0)[None])
    assert masks(saliency).q[0].nonzero().flatten().tolist() == list(range(28, 40))
    assert masks(saliency, select="low").q[0].nonzero().flatten().tolist() == list(range(12))


def test_random_scores_depend_on_seed_and_refresh_alone() -> None:
    def draw(seed: int, refresh: int) -> QK:
        return random_saliency(2, LAYOUT, seed=seed, refresh=refresh)

    assert torch.equal(draw(1, 0).q, draw(1, 0).q)
    assert not torch.equal(draw(1, 0).q, draw(1, 1).q)
    assert not torch.equal(draw(1, 0).q, draw(2, 0).q)
