"""The reference of a KL penalty is what the model was, bit for bit, after any number of steps and swaps.

`InParts` stands in for Transformer Engine's weights in FP8, which tests/te has: several tensors behind the two methods
by which they are taken out and put back.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import ranks

PARTS = ("_data", "_transpose", "_scale_inv")


class InParts(nn.Parameter):
    """A weight that three tensors hold, one of which may be missing or outdated."""

    _data: Tensor | None
    _transpose: Tensor | None
    _scale_inv: Tensor | None
    _transpose_invalid: bool

    def prepare_for_saving(self) -> tuple[list[Tensor | None], "InParts"]:
        tensors = [getattr(self, name) for name in PARTS]
        self.restore_from_saved([None, None, None])
        return tensors, self

    def restore_from_saved(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        self._data, self._transpose, self._scale_inv = tensors[:3]
        return tensors[3:]


def weight_in_parts() -> InParts:
    weight = InParts(torch.zeros(2, 3))
    data = torch.arange(6, dtype=torch.uint8).view(2, 3)
    weight.restore_from_saved([data, data.t().contiguous(), torch.tensor([0.5])])
    weight._transpose_invalid = False
    return weight


def bits(weight: InParts) -> tuple[Any, ...]:
    parts = [getattr(weight, name) for name in PARTS]
    return *(None if part is None else part.tolist() for part in parts), weight._transpose_invalid


def swap_a_weight_in_parts(offload: bool) -> dict[str, Any]:
    from megatron_longact.rl.reference import ReferenceWeights

    model = nn.Module()
    model.weight = weight_in_parts()
    model.is_first_microbatch = False  # as TE's modules have it: whether their copies in FP8 are outdated
    weight, seen = model.weight, {"was": [bits(model.weight)], "swapped": [], "own": [], "after": [], "outdated": []}
    places = [getattr(weight, name).data_ptr() for name in PARTS]
    reference = ReferenceWeights([model], offload=offload)
    for step in range(1, 4):
        weight._scale_inv.fill_(0.5**step)  # in place, as Megatron's step does it
        weight._data.add_(1)
        weight._transpose_invalid = step != 3
        seen["own"].append(bits(weight))
        model.is_first_microbatch = False
        with reference.swapped_in():
            seen["swapped"].append(bits(weight))
            seen["outdated"].append(model.is_first_microbatch)
            model.is_first_microbatch = False
            if step == 2:  # as TE drops a transpose
                weight._transpose, weight._transpose_invalid = None, True
        seen["after"].append(bits(weight))
        seen["outdated"].append(model.is_first_microbatch)
    seen["same places"] = places == [getattr(weight, name).data_ptr() for name in PARTS]
    return seen


@pytest.mark.parametrize("offload", [False, True])
def test_every_part_of_a_weight_is_swapped_and_brought_back(offload: bool) -> None:
    [seen] = ranks.run(swap_a_weight_in_parts, offload=offload)
    assert seen["swapped"] == seen["was"] * 3
    assert seen["after"] == seen["own"]
    assert seen["same places"]  # views of Megatron's buffers stay such
    assert all(seen["outdated"])


def swap_after_training(offload: bool) -> dict[str, Any]:
    """A mixture of experts whose router has a bias that is a buffer; how many tensors differ."""
    from megatron_longact.rl.reference import ReferenceWeights
    from tests.models import ModelSpec, OptimizerSpec, build, random_tokens, train_step

    moe = {"num_moe_experts": 4, "moe_token_dispatcher_type": "allgather", "moe_router_topk": 2}
    bias = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    spec = ModelSpec(dtype="bf16", config={**moe, **bias})
    built = build(spec, OptimizerSpec(distributed=True))

    def weights() -> dict[str, Tensor]:
        state = built.chunks[0].module.state_dict()
        return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}

    def differ(other: dict[str, Tensor]) -> list[str]:
        return [name for name, value in weights().items() if not torch.equal(value, other[name])]

    start, reference = weights(), ReferenceWeights(built.chunks, offload=offload)
    seen: dict[str, Any] = {"trained": [], "swapped": [], "after": []}
    for step in range(2):
        train_step(built, random_tokens(2, 32, seed=step))
        own = weights()
        seen["trained"].append(differ(start))
        for _ in range(2):
            with reference.swapped_in():
                seen["swapped"] += differ(start)
            seen["after"] += differ(own)
    return seen


@pytest.mark.parametrize("offload", [False, True])
def test_the_reference_stays_what_the_model_was(offload: bool) -> None:
    [seen] = ranks.run(swap_after_training, offload=offload)
    assert all(any("expert_bias" in name for name in trained) and len(trained) > 10 for trained in seen["trained"])
    assert seen["swapped"] == []
    assert seen["after"] == []


class Scales(nn.Module):
    """A module with a state beside its weights."""

    scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)


class Wrapped(Tensor):
    """A kind of weight that nobody knows."""


def other_states() -> dict[str, Any]:
    from megatron_longact.rl.reference import ReferenceWeights, _extra_states_kept

    module = Scales()
    with _extra_states_kept([nn.Sequential(module, nn.Linear(1, 1))]):
        module.scale = 2.0
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2).as_subclass(Wrapped))
    with pytest.raises(ValueError, match="kept as Wrapped") as error:
        ReferenceWeights([model], offload=False)
    return {"scale": module.scale, "message": str(error.value)}


def test_loading_the_reference_leaves_other_states_and_unknown_weights_are_refused() -> None:
    [seen] = ranks.run(other_states)
    assert seen["scale"] == 1.0
    assert "\n" not in seen["message"]
