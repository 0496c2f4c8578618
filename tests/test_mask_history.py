"""How masks move: overlap with the first one, rows that were ever active, and rows that hysteresis holds."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_longact import LongActConfig, QKVLayout, metrics
from megatron_longact.mask_history import MaskHistory
from megatron_longact.mla_layout import MLALayout
from megatron_longact.selection import QK, num_selected, select_masks
from megatron_longact.state import LongActState, changed_settings
from tests import ranks
from tests.models import ModelSpec
from tests.ranks import Layout
from tests.runs import train

HYSTERESIS = 0.3


def naive_hysteresis(scores: list[float], before: list[bool], *, ratio: float, hysteresis: float) -> list[bool]:
    """Walk down the ranking: rows of the mask before stay up to the margin, the best others take what is left."""
    count = num_selected(ratio, len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    near = order[: count + int(hysteresis * count + 0.5)]
    staying = [i for i in near if before[i]][:count]
    others = [i for i in order if i not in staying][: count - len(staying)]
    return [i in staying or i in others for i in range(len(scores))]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), st.booleans()), min_size=2, max_size=30))
def test_a_row_stays_until_its_rank_is_behind_by_the_margin(rows: list[tuple[float, bool]]) -> None:
    """Also for a mask before with more or fewer rows than are selected: an imported one."""
    scores, before = [score for score, _ in rows], [was for _, was in rows]
    layout, pair = QKVLayout(1, 1, len(rows)), QK(*(torch.tensor([scores]),) * 2)
    old = QK(*(torch.tensor([before]),) * 2)
    for hysteresis in (0.0, 0.25, 1.0, 100.0, 1e30):
        config = LongActConfig(ratio=0.4, hysteresis=hysteresis)
        wanted = naive_hysteresis(scores, before, ratio=0.4, hysteresis=hysteresis)
        for mask in select_masks(pair, layout=layout, config=config, before=old):
            assert mask[0].tolist() == wanted
    plain, off = (
        select_masks(pair, layout=layout, config=LongActConfig(ratio=0.4), before=each) for each in (None, old)
    )
    assert torch.equal(plain.q, off.q)


def test_hysteresis_counts_in_the_units_of_the_scope_and_from_the_lowest_up() -> None:
    layout = QKVLayout(2, 1, 10)
    saliency = QK(torch.arange(20.0)[None], torch.arange(10.0)[None])
    old = QK(torch.zeros(1, 20, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.bool))
    old.q[0, [6, 14]] = True  # the fourth and the sixth rank of their heads; the margin of 3 selected rows is 1
    config = LongActConfig(scope="head", hysteresis=HYSTERESIS)
    held = select_masks(saliency, layout=layout, config=config, before=old)
    assert held.q[0].nonzero().flatten().tolist() == [6, 8, 9, 17, 18, 19]
    low = LongActConfig(scope="head", hysteresis=HYSTERESIS, select="low", targets="q")
    held = select_masks(saliency, layout=layout, config=low, before=QK(old.q.flip(1), old.k))
    assert held.q[0].nonzero().flatten().tolist() == [0, 1, 2, 10, 11, 13]
    assert bool(held.k.all())


def test_hysteresis_counts_in_each_section_of_multi_latent_attention() -> None:
    """K's own channels and those that all heads share are ranked apart, and so held apart."""
    layout = MLALayout(2, qk_head_dim=10, qk_pos_emb_head_dim=10, v_head_dim=4, kv_lora_rank=8)
    saliency = QK(torch.arange(40.0)[None], torch.arange(30.0)[None])  # K: 2 x 10 without RoPE, 10 with
    old = QK(torch.zeros(1, 40, dtype=torch.bool), torch.zeros(1, 30, dtype=torch.bool))
    old.k[0, [12, 26]] = True  # ranks 8 of 20 and 4 of 10: the margins end at 6 + 2 and 3 + 1
    held = select_masks(saliency, layout=layout, config=LongActConfig(hysteresis=0.3), before=old)
    assert held.k[0].nonzero().flatten().tolist() == [12, 15, 16, 17, 18, 19, 26, 28, 29]


@cache
def trained(tp: int, hysteresis: float) -> list[dict[str, Any]]:
    config = LongActConfig(hysteresis=hysteresis, scope="head")
    return ranks.run(train, layout=Layout(tp=tp), world_size=tp, spec=ModelSpec(), config=config, steps=4)


def test_ranks_hold_the_same_rows_at_any_layout() -> None:
    """By each step's own saliency; 2 of 8 rows in each head, and a margin of one."""
    one, (first, second), plain = trained(1, HYSTERESIS)[0], trained(2, HYSTERESIS), trained(1, 0.0)[0]
    held = 0
    for step in range(4):
        for layer, parts in one["masks"][step].items():
            for part, mask in parts.items():
                before = one["masks"][step - 1][layer][part] if step else torch.zeros_like(mask)
                scores = one["saliency"][step][layer][part].view(-1, 8)
                wanted = [
                    naive_hysteresis(row.tolist(), old.tolist(), ratio=0.3, hysteresis=HYSTERESIS if step else 0.0)
                    for row, old in zip(scores, before.view(-1, 8), strict=True)
                ]
                assert mask.view(-1, 8).tolist() == wanted
                assert torch.equal(first["masks"][step][layer][part], mask)
                assert torch.equal(second["masks"][step][layer][part], mask)
                held += not torch.equal(plain["masks"][step][layer][part], mask)
    assert held
    shares = [result["metrics"][-1][metrics.MASK_JACCARD] for result in (one, plain)]
    assert shares[0] > shares[1]


def flat(masks: dict[int, dict[str, Tensor]]) -> Tensor:
    return torch.cat([part for layer in sorted(masks) for part in masks[layer].values()])


def test_metrics_say_how_far_the_mask_is_from_the_first_and_which_rows_were_ever_active() -> None:
    result = trained(1, 0.0)[0]
    masks = [flat(each) for each in result["masks"]]
    for step, row in enumerate(result["metrics"]):
        common, either = (masks[step] & masks[0]).sum(), (masks[step] | masks[0]).sum()
        assert row[metrics.MASK_JACCARD_FIRST] == pytest.approx(float(common / either))
        ever = torch.stack(masks[: step + 1]).any(0)
        assert row[metrics.EVER_ACTIVE_FRACTION] == pytest.approx(float(ever.float().mean()))
    assert result["metrics"][-1][metrics.EVER_ACTIVE_FRACTION] > result["metrics"][0][metrics.EVER_ACTIVE_FRACTION]
    assert result["metrics"][-1][metrics.MASK_JACCARD_FIRST] < 1
    last = result["state"]["history"]["last_active"]
    last = torch.cat([torch.cat([last["q"][i], last["k"][i]]) for i in range(2)])
    wanted = [max((step + 1 for step in range(4) if masks[step][row]), default=0) for row in range(len(last))]
    assert last.tolist() == wanted


def test_a_checkpoint_from_before_there_was_a_history_begins_one() -> None:
    mask = QK(torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    state = LongActState(updates=7, masks=mask).state_dict()
    del state["history"]
    loaded = LongActState.from_state_dict(state, torch.device("cpu"))
    assert (loaded.history.all_moved, loaded.history.last_active) == (7, None)
    assert loaded.history.ever_active is None
    assert loaded.history.first is not None
    assert torch.equal(loaded.history.first.q, mask.q)
    on = loaded.after_update(mask, exact=True, before=loaded.masks)
    again = LongActState.from_state_dict(on.state_dict(), torch.device("cpu")).without_masks().history
    assert again.last_active is not None
    assert again.last_active.q.tolist() == [[8, 0]]
    assert again.last_moved is not None
    assert again.last_moved.q.tolist() == [[8, 7]]  # of the updates before nothing is known
    assert again == MaskHistory(all_moved=7, last_active=again.last_active)
    moved = on.after_update(mask, exact=False, before=mask).history.last_moved
    assert moved is not None
    assert moved.q.tolist() == [[9, 9]]
    saved = {name: value for name, value in vars(LongActConfig()).items() if name != "hysteresis"}
    assert changed_settings(saved, LongActConfig()) == ""
    with pytest.raises(ValueError, match=r"--longact-hysteresis 0.0 -> 0.5"):
        changed_settings(saved, LongActConfig(hysteresis=0.5))
