"""The count of moved and of frozen rows: it must see what it claims is not there."""

import pytest
import torch

from megatron_longact import LongActConfig
from tests import ranks
from tests.ranks import Layout

ROWS = 2 * (4 + 2) * 8  # layers x (Q heads + K heads) x channels of the test model


def audit(config: LongActConfig | None, *, tamper: str = "", distributed: bool = False) -> dict[str, int]:
    """tamper: "masters" or "weights" are changed after two steps, the latter as a common scale changes FP8 weights."""
    from megatron_longact import LongAct
    from megatron_longact.rl.audit import RowAudit
    from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step
    from tests.runs import name_all

    spec = ModelSpec(layers=2, dtype="bf16" if distributed else "fp32")
    built = build(spec, OptimizerSpec(distributed=distributed))
    longact = None if config is None else LongAct.attach(built.chunks, built.optimizer, config)
    counter = RowAudit(built.chunks, built.optimizer, longact)
    for step in range(2):
        train_step(built, random_tokens(4, 15, seed=step), before_forward=name_all(longact) if longact else None)
        counter.after_step()
    changed = {"masters": [m for s in counter._shards for m in s.masters()]}
    changed["weights"] = [layer.weight for layer in counter._model.layers]
    with torch.no_grad():
        for tensor in changed.get(tamper, []):
            tensor.mul_(1.5).add_(1e-3)
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
    [counts] = ranks.run(audit, config=LongActConfig(ratio=0.25), tamper="masters")
    assert counts["frozen_changed"] == counts["never_active"] > 0
    [drifted] = ranks.run(audit, config=LongActConfig(ratio=0.25, freeze="grad-only"))
    assert drifted["frozen_changed"] == drifted["never_active"] > 0  # weight decay


@pytest.mark.parametrize("tamper", ["weights", "masters"])
def test_masters_are_counted_and_not_what_became_of_them(tamper: str) -> None:
    run = {"config": LongActConfig(ratio=0.25), "tamper": tamper, "distributed": True}
    for counts in ranks.run(audit, world_size=2, **run):  # a rank has a part of each master
        assert counts["rows"] == ROWS
        assert counts["frozen_changed"] == (counts["never_active"] if tamper == "masters" else 0)
        assert counts["moved"] == (ROWS if tamper == "masters" else ROWS - counts["never_active"])


def test_dense_steps_leave_nothing_frozen() -> None:
    warming_up = LongActConfig(ratio=0.25, warmup_steps=5)
    for config in (None, warming_up):
        [counts] = ranks.run(audit, config=config)
        assert (counts["never_active"], counts["moved"]) == (0, ROWS)
