"""Which devices tensors are on, and how many kernels a capture starts: on fake CUDA tensors, which hold no values.

What stands in: torch's `FakeTensorMode` for a GPU, so that operations check devices and shapes and compute nothing;
torch's fake process group for tensor-parallel ranks. A launch is an operation that makes or writes a tensor; views are
none. No Transformer Engine is in it: `linear_qkv` is a module that returns a tensor of the right shape.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_longact import LongActConfig
from megatron_longact.attention_layout import ShardedLayout
from megatron_longact.masked_update import RowIndex, Shard, StrictFreeze, mask_gradients
from megatron_longact.qkv_layers import QKVLayer, QKVModel
from megatron_longact.qkv_layout import QKVLayout
from megatron_longact.saliency import SaliencyCapture
from megatron_longact.selection import ModelGroups

CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")

# -- devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", [(CUDA,), (HOST,), (CUDA, HOST)], ids=["gpu", "host", "both"])
@pytest.mark.parametrize("span", [(0, 48), (3, 41)], ids=["whole rows", "parts of rows"])
def test_rows_are_named_on_the_device_of_what_they_cut(
    masters: tuple[torch.device, ...], span: tuple[int, int]
) -> None:
    """Masters of a CPU-offloaded optimizer are on the host, weights and gradients on the GPU."""
    start, end = span
    rows = torch.tensor([0, 2, 5, 10])
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.empty(12, 4, device=CUDA))
        weight.main_grad = torch.empty(12, 4, device=CUDA)
        tensors = [torch.empty(end - start, device=device) for device in masters]
        frozen = {weight: RowIndex(rows, CUDA)}
        shard = Shard(weight, start, end, lambda: tensors, tensors[0])
        freeze = StrictFreeze([shard], torch.optim.SGD([tensors[0]]), LongActConfig())
        mask_gradients(frozen)
        freeze.before_step(frozen)
        kept = [values.device for _, _, values in freeze._saved]
        freeze.after_step(frozen)
    assert set(kept) == set(masters)  # a freeze moves nothing between devices


# -- launches ------------------------------------------------------------------------------------------


class Model(QKVModel):
    """Its ranges are read off tensors on the host, which have values."""

    @property
    def sharded(self) -> Any:
        return Sharded(self.layout, self.groups.tp.size())


class Sharded(ShardedLayout):
    def qk_ranges(self, _: Any, tp_rank: int) -> Any:
        with unset_fake_temporarily():
            return super().qk_ranges(*self.layout.projections, tp_rank)


QWEN3_8B = QKVLayout(num_attention_heads=32, num_query_groups=8, kv_channels=128)
LENGTHS = (8_192, 32_768, 131_072)


UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


class Projection(nn.Module):
    """In place of `linear_qkv`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, 1, dtype=torch.bfloat16, device=CUDA))

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return torch.empty(*hidden.shape[:2], len(self.weight), dtype=torch.bfloat16, device=CUDA), None


class Attention(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.linear_qkv = Projection(rows)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_qkv(hidden)[0]


class Launches(TorchDispatchMode):
    """Counts what writes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not is_view and isinstance(result, Tensor) and result.device == CUDA and function is not UNSAFE_VIEW:
            self.of[str(function)] += 1
        return result


@pytest.fixture
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def launches(tokens: int, *, tp: int, masked: bool) -> Counter[str]:
    """Of one layer and micro-batch: those of two layers less those of one, so that what is done once is out of it."""
    one, two = (_launches(layers, tokens, tp, masked) for layers in (1, 2))
    two.subtract(one)
    return +two


def _launches(layers: int, tokens: int, tp: int, masked: bool) -> Counter[str]:
    alone, whole = dist.new_group([0]), dist.group.WORLD
    assert QWEN3_8B.projections  # made here, where tensors have values
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = QWEN3_8B.rows_per_partition(tp)
        chunk = nn.Sequential(*(Attention(rows) for _ in range(layers)))
        model = Model(
            chunks=[chunk],
            layers_of_chunks=[[QKVLayer(number + 1, attention) for number, attention in enumerate(chunk)]],
            layout=QWEN3_8B,
            groups=ModelGroups(tp=whole if tp > 1 else alone, dp_cp=alone, cp=alone, pp=alone),
            layer_numbers=list(range(1, layers + 1)),
            device=CUDA,
        )
        capture = SaliencyCapture(
            model, LongActConfig(), counts=lambda: True, clock=nullcontext(), warn=lambda message: None
        )
        if masked:
            capture.set_tokens(torch.empty(1, tokens, dtype=torch.bool, device=CUDA))
        hidden = torch.empty(tokens, 1, 1, dtype=torch.bfloat16, device=CUDA)
        with Launches() as counted:
            chunk(hidden)
    counted.of.subtract({"aten.empty.memory_format": layers})  # the projections' own
    return +counted.of


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "token mask"])
@pytest.mark.parametrize("tp", [1, 4])
def test_launches_of_a_capture_do_not_depend_on_the_length(tp: int, masked: bool) -> None:
    counts = [launches(tokens, tp=tp, masked=masked) for tokens in LENGTHS]
    for tokens, count in zip(LENGTHS, counts, strict=True):
        print(f"TP {tp}, {tokens} tokens, masked {masked}: {count.total()} launches a layer: {dict(count)}")
    assert all(count == counts[0] for count in counts)
