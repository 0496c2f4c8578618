"""The count of moved and of frozen rows: it must see what it claims is not there."""

import pytest
import torch

from megatron_longact import LongActConfig
from tests import ranks
from tests.ranks import Layout

ROWS = 2 * (4 + 2) * 8  # layers x (Q heads + K heads) x channels of the test model


def audit(
    config: LongActConfig | None, *, tamper: str = "", distributed: bool = False, restart: bool = False
) -> dict[str, int]:
    """tamper: "masters" or "weights" are changed after two steps, the latter as a common scale changes FP8 weights.

    restart: what a checkpoint holds goes on in a new count between the steps.
    """
    from megatron_longact import LongAct
    from megatron_longact.rl.audit import RowAudit
    from megatron_longact.rl.state import LoopState
    from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step
    from tests.runs import name_all

    spec = ModelSpec(layers=2, dtype="bf16" if distributed else "fp32")
    built = build(spec, OptimizerSpec(distributed=distributed))
    longact = None if config is None else LongAct.attach(built.chunks, built.optimizer, config)
    counter = RowAudit(built.chunks, built.optimizer, longact)
    for step in range(2):
        train_step(built, random_tokens(4, 15, seed=step), before_forward=name_all(longact) if longact else None)
        counter.after_step()
        if restart and step == 0:
            saved, loaded = LoopState(rows=counter.history), LoopState()
            counter.look()
            loaded.load_state_dict(saved.state_dict())
            counter = RowAudit(built.chunks, built.optimizer, longact, since=1, history=loaded.rows)
    changed = {"masters": [m for s in counter._shards for m in s.masters()]}
    changed["weights"] = [weight for layer in counter._model.layers for weight in layer.weights]
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


def test_a_run_that_is_started_again_counts_on() -> None:
    run = {"layout": Layout(tp=2), "world_size": 2, "config": LongActConfig(ratio=0.25)}
    whole, resumed = (ranks.run(audit, **run, restart=restart) for restart in (False, True))
    assert resumed == whole
    assert whole[0]["moved"] > 0.25 * ROWS  # more than the last step alone moved


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


def bf16_changes(config: LongActConfig | None, *, distributed: bool, lr: float = 1e-5) -> dict[str, object]:
    """What the count says after each of two steps, and what is so, naively, of the whole weights."""
    from megatron_longact import LongAct
    from megatron_longact.rl.bf16_changes import Bf16Changes
    from tests.models import ModelSpec, OptimizerSpec, build, full_weights, random_tokens, train_step
    from tests.reference import channels_of_row, row_mask
    from tests.runs import name_all

    spec = ModelSpec(layers=2)
    built = build(spec, OptimizerSpec(distributed=distributed, lr=lr, weight_decay=0.0))
    longact = None if config is None else LongAct.attach(built.chunks, built.optimizer, config)
    counter = Bf16Changes(built.chunks, built.optimizer, longact)
    rows = channels_of_row(spec.heads, spec.groups, spec.kv_channels)
    start = last = {name: weight.bfloat16() for name, weight in full_weights(built).items()}
    said, naive = [], []
    for step in range(2):
        train_step(built, random_tokens(4, 15, seed=step), before_forward=name_all(longact) if longact else None)
        said.append(counter.after_step())
        now = {name: weight.bfloat16() for name, weight in full_weights(built).items()}
        shares = {}
        for suffix, old in (("", last), ("_since_start", start)):
            changed = {name: now[name] != old[name] for name in now}
            active = frozen = torch.zeros(0)
            for n in (1, 2):
                of_rows = changed[f"decoder.layers.{n - 1}.self_attention.linear_qkv.weight"].float()
                is_qk = torch.tensor([part in ("q", "k") for part, _ in rows])
                moves = row_mask(longact.masks[n], rows).bool() if longact else torch.ones_like(is_qk)
                active = torch.cat([active, of_rows[is_qk & moves].flatten()])
                frozen = torch.cat([frozen, of_rows[is_qk & ~moves].flatten()])
            every = torch.cat([part.float().flatten() for part in changed.values()])
            shares[f"bf16/changed_model{suffix}"] = float(every.double().mean())
            shares[f"bf16/changed_qk{suffix}"] = float(torch.cat([active, frozen]).double().mean())
            if not suffix:
                shares["bf16/changed_qk_active"] = float(active.double().mean())
                shares["bf16/changed_qk_frozen"] = float(frozen.double().mean()) if len(frozen) else None
        naive.append(shares)
        last = now
    if longact is not None:
        longact.detach()
    return {"said": said, "naive": naive}


@pytest.mark.parametrize(
    ("config", "layout", "world_size", "distributed"),
    [
        (None, Layout(tp=2), 4, True),
        (LongActConfig(), Layout(tp=2), 2, False),
        (LongActConfig(freeze="grad-only", moments="hold"), Layout(), 2, True),
    ],
    ids=str,
)
def test_what_bf16_shows_is_counted_alike_in_every_layout(config, layout, world_size, distributed) -> None:
    run = {"config": config, "distributed": distributed}
    for result in ranks.run(bf16_changes, layout=layout, world_size=world_size, **run):
        for said, naive in zip(result["said"], result["naive"], strict=True):
            nothing = {name for name, share in naive.items() if share is None}
            assert nothing == {name for name, share in said.items() if share is None}
            assert {n: said[n] for n in said.keys() - nothing} == pytest.approx(
                {n: naive[n] for n in naive.keys() - nothing}, rel=1e-9
            )
        first, second = result["said"]
        assert 0 < first["bf16/changed_model"] < 0.5  # most of what moved in fp32 does not show
        assert second["bf16/changed_model"] < second["bf16/changed_model_since_start"]
        assert (first["bf16/changed_qk_frozen"] or 0) == 0
