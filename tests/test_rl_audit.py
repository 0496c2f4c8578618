"""The count of moved and of frozen rows: it must see what it claims is not there."""

import pytest
import torch

from megatron_longact import LongActConfig
from tests import ranks
from tests.ranks import Layout

ROWS = 2 * (4 + 2) * 8  # layers x (Q heads + K heads) x channels of the test model


def audit(config: LongActConfig | None, *, tamper: bool = False) -> dict[str, int]:
    from megatron_longact import LongAct
    from megatron_longact.rl.reports.audit import RowAudit
    from tests.models import ModelSpec, build, random_tokens, train_step
    from tests.runs import name_all

    built = build(ModelSpec(layers=2))
    longact = None if config is None else LongAct.attach(built.chunks, built.optimizer, config)
    counter = RowAudit(built.chunks, longact)
    for step in range(2):
        train_step(built, random_tokens(4, 15, seed=step), before_forward=name_all(longact) if longact else None)
        counter.after_step()
    if tamper:
        with torch.no_grad():
            for layer in counter._model.layers:
                layer.weight.add_(1e-3)
    counts = vars(counter.count())
    if longact is not None:
        longact.detach()
    return counts


@pytest.mark.parametrize("tp", [1, 2])
def test_strict_leaves_frozen_rows_alone(tp: int) -> None:
    for counts in ranks.run(audit, layout=Layout(tp=tp), world_size=tp, config=LongActConfig(ratio=0.25)):
        assert counts["rows"] == ROWS
        assert counts["frozen_changed"] == 0
        assert 0 < counts["never_active"] <= 0.75 * ROWS
        assert counts["moved"] == ROWS - counts["never_active"]


def test_a_changed_frozen_row_is_counted() -> None:
    [counts] = ranks.run(audit, config=LongActConfig(ratio=0.25), tamper=True)
    assert counts["frozen_changed"] == counts["never_active"] > 0
    [drifted] = ranks.run(audit, config=LongActConfig(ratio=0.25, freeze="grad-only"))
    assert drifted["frozen_changed"] == drifted["never_active"] > 0  # weight decay


def test_dense_steps_leave_nothing_frozen() -> None:
    warming_up = LongActConfig(ratio=0.25, warmup_steps=5)
    for config in (None, warming_up):
        [counts] = ranks.run(audit, config=config)
        assert (counts["never_active"], counts["moved"]) == (0, ROWS)
