"""examples/integrations on real Megatron models: hooks called with the arguments and in the order of their trainers."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import integrations, ranks
from tests.integrations import longact_late, tensors_equal
from tests.ranks import Layout


def test_slime_keeps_longact_over_rollouts_and_resumes(tmp_path: Path) -> None:
    """Its `train` replaces the finalize function at each rollout; what comes out is as if nobody had."""
    run = {"layout": Layout(tp=2), "world_size": 2, "folder": tmp_path}
    hooked = ranks.run(integrations.slime, rollouts=2, resume=False, **run)
    by_hand = ranks.run(integrations.slime, rollouts=2, resume=False, hooks=False, **run)
    for mine, wanted in zip(hooked, by_hand, strict=True):
        assert tensors_equal(mine, wanted)
        assert mine["state"]["updates"] == 4
        assert not tensors_equal(mine["before"], mine["weights"])
    [resumed, _] = ranks.run(integrations.slime, rollouts=1, resume=True, **run)
    assert resumed["state"]["updates"] == 4
    assert resumed["state"]["refreshes"] == 2


def test_slime_settings_are_judged_before_anything_is_built() -> None:
    assert integrations.slime_hooks.config_from(Namespace(longact_ratio=0.5, load="x")).ratio == 0.5
    with pytest.raises(ValueError, match="no LongAct setting \\['rows'\\]"):
        integrations.slime_hooks.check_settings(Namespace(longact_rows=3))
    with pytest.raises(ValueError, match="longact-ratio"):
        integrations.slime_hooks.check_settings(Namespace(longact_ratio=7))


def test_verl_actor_but_not_critic() -> None:
    for result in ranks.run(integrations.verl, layout=Layout(tp=2), world_size=2):
        frozen, changed = result["rows"]
        assert frozen > 100
        assert changed == 0
        assert result["critic"] is None
        assert result["state"]["updates"] == 2
        assert tensors_equal(result["state"], result["resumed"])


def test_nemo_rl_worker_goes_on(tmp_path: Path) -> None:
    for result in ranks.run(integrations.nemo_rl, layout=Layout(tp=2), world_size=2, folder=tmp_path):
        frozen, changed = result["rows"]
        assert frozen > 100
        assert changed == 0
        assert result["state"]["updates"] == 2
        assert tensors_equal(result["state"], result["resumed"])


def test_skyrl_selects_from_all_calls_of_a_step() -> None:
    ranks.run(integrations.skyrl, layout=Layout(tp=2), world_size=2)


@pytest.mark.parametrize(
    ("packed_further", "lengths"), [(None, [3, 2]), ([[1, 2], [2]], [1, 2, 2])], ids=["one a row", "several a row"]
)
def test_skyrl_leaves_true_lengths_beside_padded_bounds(packed_further: Any, lengths: list[int]) -> None:
    def preprocess(ids: Any, mask: Any, *, sub_seq_lengths: Any) -> Any:
        return ids, SimpleNamespace(cu_seqlens_q=torch.tensor([0, 4, 8, 12]))

    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    _, packed = integrations.skyrl_worker.with_lengths(preprocess)(None, mask, sub_seq_lengths=packed_further)
    assert packed.seq_lens.tolist() == lengths


def test_nemo_rl_leaves_true_lengths_beside_padded_bounds() -> None:
    given = (None, None, SimpleNamespace(), torch.tensor([0, 3, 5]), torch.tensor([0, 4, 8]))
    assert integrations.nemo_rl_worker.with_lengths(lambda ids: given)(None)[2].seq_lens.tolist() == [3, 2]


def test_the_tokens_that_are_no_padding_are_named() -> None:
    """As ms-swift's collator pads: a row to a multiple, and under context parallelism each sequence too."""
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 8, 12, 16]), seq_lens=torch.tensor([5, 4]))
    named = longact_late.real_tokens(packed, None)
    assert named.tolist() == [[True] * 5 + [False] * 3 + [True] * 4 + [False] * 4]
    hidden = ~torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    hidden[..., 2] = True
    assert longact_late.real_tokens(None, hidden).tolist() == [[True, True, False]]
    assert longact_late.real_tokens(None, hidden[:, :, 2:]).tolist() == [[True, True, False]]  # as SkyRL gives it
    assert longact_late.real_tokens(None, None) is longact_late.real_tokens(SimpleNamespace(), hidden) is None
