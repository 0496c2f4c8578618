"""The GPU tier: one process group for all tests, docs/gpu-results.md at the end; without a GPU it says so."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.results import COMMAND, ResultsPage, machine
from tests.launch import ROOT

HAS_GPU = torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    if HAS_GPU:
        config.pluginmanager.register(ResultsPage(ROOT / "docs/gpu-results.md", machine=machine()), "gpu-results")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.getreports("skipped") if "tests/gpu/" in report.nodeid]
    if skipped and not HAS_GPU:
        terminalreporter.section("the GPU tier was NOT RUN", red=True)
        terminalreporter.line(
            f"{len(skipped)} tests need a CUDA GPU and there is none; on a machine with one: {COMMAND}"
        )


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    """One rank over NCCL, with Megatron's parallel state."""
    from megatron.core import parallel_state

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.cuda.set_device(0)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_rank(_process_group: None) -> Iterator[None]:
    """Seeded alike for each test; afterwards nothing of its model, its FP8 scales and its graphs is left."""
    from megatron.core import tensor_parallel

    # CUDA graphs ask for this tracker, as Megatron's arguments give it with --cuda-graph-impl
    tensor_parallel.model_parallel_cuda_manual_seed(1234, te_rng_tracker=True, force_reset_rng=True)
    yield
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    torch.cuda.set_stream(torch.cuda.default_stream())  # Megatron's graph managers leave another one current
    gc.collect()
    torch.cuda.empty_cache()
