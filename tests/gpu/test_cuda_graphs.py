"""The GPU tier: training with CUDA graphs. Those without attention work; one that would replay it is refused."""

from typing import Any

import pytest

from megatron_longact import LongAct, LongActConfig
from tests.gpu.models import BATCH, GPU_TIER, SEQUENCE, GPUModel, GPUSpec, build, copy_weights, train_step

pytestmark = GPU_TIER


def capture_graphs(model: GPUModel) -> None:
    """What Megatron's training loop does after the warm-up steps."""
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(0, None, BATCH, BATCH, 1)
    helper = TECudaGraphHelper(
        model=[model.chunk],
        config=model.config,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        optimizers=[model.optimizer],
    )
    helper.create_cudagraphs()
    destroy_num_microbatches_calculator()


def test_graphs_of_the_mlp_leave_capture_as_it_is(record_property: Any) -> None:
    still = {"lr": 0.0, "weight_decay": 0.0}  # so that both see the same weights
    eager = build(GPUSpec(optimizer=still))
    settings = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["mlp"]}
    graphed = build(GPUSpec(transformer=settings, optimizer=still))
    copy_weights(eager, graphed)
    saliencies = []
    for model in (eager, graphed):
        with LongAct.attach([model.chunk], model.optimizer, LongActConfig()) as longact:
            train_step(model, longact, seed=0)
            if model is graphed:
                capture_graphs(model)
                assert all(layer.cuda_graphs for layer in model.layers)
            train_step(model, longact, seed=1)
            assert (longact.state.updates, longact.state.rejected) == (2, 0)
            saliencies.append([layer["q"] for layer in longact.saliency.values()])
    difference = max(float(((a - b) / a).abs().max()) for a, b in zip(*saliencies, strict=True))
    record_property("largest relative difference of the saliency", difference)
    assert difference < 1e-2  # bf16: the graph may choose other kernels


@pytest.mark.parametrize(
    "modules", [[], ["attn"]], ids=["layer", "attn"]
)  # of the MLP alone megatron-core 0.19 makes none
def test_megatrons_own_graphs_are_refused_before_anything_is_trained(modules: list[str]) -> None:
    from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

    model = build(GPUSpec(transformer={"cuda_graph_impl": "local", "cuda_graph_modules": modules}))
    with LongAct.attach([model.chunk], model.optimizer, LongActConfig()) as longact:
        with pytest.raises(ValueError, match="--cuda-graph-impl local in training"):
            train_step(model, longact, seed=0)
        assert longact.state.updates == 0
    delete_cuda_graphs()
