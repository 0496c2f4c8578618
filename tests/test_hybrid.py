"""Models in which some layers have no attention: those are left out, named once, and a rank may have nothing else."""

import json
import logging
from typing import Any

import pytest
import torch

from megatron_longact import LongAct, LongActConfig
from tests import ranks
from tests.models import ModelSpec, OptimizerSpec, build
from tests.ranks import Layout
from tests.runs import train

ATTENTION = {"n_heads_in_group": 4, "no_op": False, "replace_with_linear": False}
NO_ATTENTION = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
LINEAR = {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True}
FFN = {"ffn_hidden_size": 64, "no_op": False, "replace_with_linear": False}


def blocks(*attentions: dict[str, Any]) -> str:
    return json.dumps({"block_configs": [{"attention": attention, "ffn": FFN} for attention in attentions]})


HETEROGENEOUS = ModelSpec(layers=4, groups=4, blocks=blocks(ATTENTION, ATTENTION, NO_ATTENTION, LINEAR))
"""One group of K in each layer with attention, whatever the model's configuration says."""
HYBRID = ModelSpec(layers=4, pattern="--|-*")
SPECS = {
    "heterogeneous": (HETEROGENEOUS, [1, 2], "TransformerLayer 3; ColumnParallelLinearGathered 4"),
    "hybrid": (HYBRID, [4], "MLPLayer 1, 2, 3"),
}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def trained(*, spec: ModelSpec, config: LongActConfig, steps: int) -> dict[str, Any]:
    logger, lines = logging.getLogger("megatron_longact"), Lines()
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        result = train(spec=spec, optimizer=OptimizerSpec(distributed=True), config=config, steps=steps)
        return {**result, "lines": [line for line in lines.lines if "leaves out" in line]}
    finally:
        logger.removeHandler(lines)


@pytest.mark.parametrize("select", ["high", "gradient", "weight-norm"])
@pytest.mark.parametrize(("spec", "numbers", "named"), SPECS.values(), ids=SPECS)
def test_a_stage_without_attention_agrees_with_the_whole_model(
    spec: ModelSpec, numbers: list[int], named: str, select: Any
) -> None:
    arguments = {"spec": spec, "config": LongActConfig(select=select), "steps": 2}
    [wanted] = ranks.run(trained, **arguments)
    results = ranks.run(trained, layout=Layout(pp=2), world_size=2, **arguments)
    said = f"LongAct leaves out {4 - len(numbers)} of 4 layers, which have no query and key projections: {named}"
    assert [wanted["lines"], results[0]["lines"]] == [[said], [said]]
    for result in results:
        for step, masks in enumerate(wanted["masks"]):
            assert list(masks) == list(result["masks"][step]) == numbers
            for layer, part in ((layer, part) for layer in masks for part in "qk"):
                assert torch.equal(result["masks"][step][layer][part], masks[layer][part])
        assert result["metrics"][-1]["longact/masked_grad_norm_share"] == pytest.approx(
            wanted["metrics"][-1]["longact/masked_grad_norm_share"], rel=1e-4
        )
    for name, weight in wanted["weights"][-1].items():
        torch.testing.assert_close(results[0]["weights"][-1][name], weight, rtol=1e-4, atol=1e-5)


def attached(*, spec: ModelSpec) -> str:
    built = build(spec)
    try:
        LongAct.attach(built.chunks, built.optimizer, LongActConfig()).detach()
    except ValueError as error:
        return str(error)
    return ""


def test_layers_of_several_layouts_are_refused_on_every_rank() -> None:
    two_groups = {**ATTENTION, "n_heads_in_group": 2}
    spec = ModelSpec(layers=2, groups=4, blocks=blocks(ATTENTION, two_groups))
    for message in ranks.run(attached, layout=Layout(pp=2), world_size=2, spec=spec):
        assert "num_query_groups=2" in message
        assert "one layout of attention" in message
