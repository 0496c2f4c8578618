"""Which rows of the Q and K projections cannot have changed, for whoever sends changes to an inference engine.

Names and the order of rows are Hugging Face's, and tensors are whole ones: every rank knows all of the model's rows, so
nothing is communicated, at any parallel layout.
"""

from torch import Tensor

from megatron_longact.imported_masks import rows_by_name
from megatron_longact.qkv_layers import QKVModel
from megatron_longact.selection import QK
from megatron_longact.state import LongActState


def frozen_rows_by_hf_name(state: LongActState, model: QKVModel, *, since: int) -> dict[str, Tensor]:
    """Rows that no update after number `since` could move: int64, ascending, on the host, by name of the tensor.

    Such as "model.layers.0.self_attn.q_proj.weight", and "….bias" where there is one; with none an empty tensor.
    Updates are those of `LongAct.state.updates`, which a resumed run counts on; since=0: never moved at all.
    None are named of a run with `freeze="grad-only"` or with weights kept in FP8, which move by themselves, nor since
    before a checkpoint that does not know. Raises `ValueError` for an update that has not been, and for a model with an
    attention output gate, whose rows are not mapped.
    """
    if not 0 <= since <= state.updates:
        raise ValueError(f"since is {since}; updates 0 to {state.updates} have been")
    if not model.layout.hf_mapped:
        raise ValueError("rows of a model with --attention-output-gate are not mapped to Hugging Face's")
    frozen = _frozen(state, model, since)
    kinds = ("weight", "bias") if model.has_bias else ("weight",)
    return {
        f"{name}.{kind}": rows.nonzero().flatten()
        for place, number in enumerate(model.layer_numbers)
        for name, rows in rows_by_name([part[place] for part in frozen], model.layout, number, others=False)
        for kind in kinds
    }


def _frozen(state: LongActState, model: QKVModel, since: int) -> QK:
    """The same as masks, on the host: bool [L, nq] and [L, nk]."""
    last = state.history.last_moved
    if last is None:  # before the first update, or since a checkpoint that does not know
        return model.channels(state.updates <= since)
    return QK(*(part.cpu() <= since for part in last))
