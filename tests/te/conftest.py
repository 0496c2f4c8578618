"""The tier of Transformer Engine without a GPU: it runs alone (`make test-te`), and is skipped everywhere else.

But for `test_fake_gpu.py`, which needs no Transformer Engine and runs in `make test` too.

In the tests' own process nothing is changed: `import transformer_engine.pytorch` works there, and "cuda" means CUDA, as
fake tensors want it. What builds a module or a `Float8Tensor` asks for the current device, so it goes through
`tests.ranks`, whose ranks are in CPU mode and have imported `tests.te.transformer_engine_on_cpu` here.
"""

import importlib.util
import multiprocessing
from pathlib import Path

import pytest

from tests import ranks


def pytest_configure(config: pytest.Config) -> None:
    if why_not(config) is None:
        # the context is one for the process, so that of tests.ranks too
        context = multiprocessing.get_context("forkserver")
        assert context is ranks._CONTEXT
        context.set_forkserver_preload(["tests.te.transformer_engine_on_cpu"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = why_not(config)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.te)
            if reason is not None and item.path.name != "test_fake_gpu.py":
                item.add_marker(pytest.mark.skip(reason=reason))


def why_not(config: pytest.Config) -> str | None:
    """Why the tier does not run here; None if it does."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "NOT RUN: Transformer Engine is not here; scripts/setup_te.sh makes an environment that has it"
    return None if config.option.markexpr == "te" else "NOT RUN: it runs alone: make test-te"
