"""A plan as a whole: its numbers, the table on the screen, and its JSON."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_longact.config import LongActConfig
from megatron_longact.conversion.hf_config import HFModel
from megatron_longact.conversion.plan import table
from megatron_longact.planning import cost, roofline
from megatron_longact.planning.cost import Bytes, CaptureWork, Collective, MaskWork, Place
from megatron_longact.planning.roofline import Assumptions, Share
from megatron_longact.planning.run_shape import Attention, Batch, Parallel
from megatron_longact.planning.shared_prompts import Group, Savings, savings
from megatron_longact.planning.training_memory import training_memory


@dataclass(frozen=True)
class Plan:
    """What LongAct costs in one run, on the rank that does most: `make_plan`."""

    name: str
    parallel: Parallel
    batch: Batch
    config: LongActConfig
    assumed: Assumptions
    place: Place
    collectives: list[Collective]
    metric_collectives: list[Collective]
    held: dict[str, Bytes]
    saved_masters: Bytes
    reduction_temporaries: int
    capture: CaptureWork
    mask: MaskWork
    share: Share
    training: dict[str, float]
    """Bytes of the training itself by name: `training_memory`."""
    shared_prompts: Savings | None

    def held_bytes(self, *, host: bool) -> float:
        """The mean of all that is held between steps, on the device or in the host's memory."""
        return sum(part.mean for name, part in self.held.items() if name.startswith("host: ") == host)

    def as_json(self) -> dict[str, Any]:
        """All numbers: bytes, seconds, and shares of the dense step."""
        return {
            "model": self.name,
            "gpus": self.parallel.world_size,
            "parallel": asdict(self.parallel),
            "batch": asdict(self.batch),
            "longact": asdict(self.config),
            "rank": self.place._asdict(),
            "refresh_collectives": [asdict(call) | {"wire_bytes": call.wire_bytes} for call in self.collectives],
            "metric_collectives": [asdict(call) | {"wire_bytes": call.wire_bytes} for call in self.metric_collectives],
            "held": {name: part._asdict() for name, part in self.held.items()},
            "saved_masters": self.saved_masters._asdict(),
            "reduction_temporaries": self.reduction_temporaries,
            "capture": asdict(self.capture),
            "mask": asdict(self.mask),
            "training_memory": self.training,
            "shared_prompts": self.shared_prompts and self.shared_prompts.as_json(),
            "seconds": asdict(self.share),
            "share_of_step": {str(n): self.share.over_dense(n) for n in self.intervals},
            "assumed": asdict(self.assumed),
        }

    @property
    def intervals(self) -> list[int]:
        """Refresh intervals that shares are given for: the one that is asked for, and 1 and 10."""
        return sorted({self.config.refresh_interval, 1, 10})


def make_plan(
    model: HFModel,
    parallel: Parallel,
    batch: Batch,
    config: LongActConfig,
    *,
    assumed: Assumptions,
    name: str = "",
    group: Group | None = None,
) -> Plan:
    """The plan of a run; `ValueError`, in one line, for sizes that do not fit each other.

    group: what prompts are shared by, None: each response has its own.
    """
    _check(model, parallel)
    attention = Attention.of(model)
    layers = max(parallel.stages(model.num_layers))
    busiest = max(range(parallel.tp), key=lambda rank: cost.qk_rows(attention, parallel, rank))
    place = Place(layers, busiest)
    collectives = cost.refresh_collectives(attention, parallel, config, layers=layers)
    capture = cost.capture_work(attention, parallel, batch, config, place=place)
    mask = cost.mask_work(attention, parallel, config, place=place)
    saved = savings(model, parallel, batch, group, assumed=assumed) if group else None
    return Plan(
        name=name or model.model_type,
        parallel=parallel,
        batch=batch,
        config=config,
        assumed=assumed,
        place=place,
        collectives=collectives,
        metric_collectives=cost.metric_collectives(parallel),
        held=cost.held(attention, parallel, config, place=place),
        saved_masters=cost.saved_masters(attention, parallel, config, place=place),
        reduction_temporaries=cost.reduction_temporaries(attention, parallel, config, layers=layers),
        capture=capture,
        mask=mask,
        share=roofline.share(
            model, parallel, batch, capture=capture, mask=mask, collectives=collectives, assumed=assumed
        ),
        training=training_memory(
            model,
            parallel,
            batch,
            row=group.row if group else batch.seq_length,
            gathered=saved.gathered_at_once if saved else 0,
        ),
        shared_prompts=saved,
    )


def _check(model: HFModel, parallel: Parallel) -> None:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % parallel.tp or max(groups, parallel.tp) % min(groups, parallel.tp):
        raise ValueError(f"--tp is {parallel.tp}; it must divide {heads} heads, and fit {groups} query groups")
    experts = 1 if model.experts is None else model.experts.count
    if experts % parallel.ep:
        raise ValueError(f"--ep is {parallel.ep}; the model has {experts if experts > 1 else 'no'} experts to spread")


def text(plan: Plan) -> str:
    """The plan for the screen."""
    parts = [_header(plan), _communication(plan), _memory(plan), _reads(plan), _share(plan), _training(plan)]
    parts += [_shared_prompts(plan.shared_prompts)] if plan.shared_prompts else []
    parts += [_assumed(plan.assumed)]
    return "\n\n".join(parts)


def _header(plan: Plan) -> str:
    sizes, batch, config = plan.parallel, plan.batch, plan.config
    layout = ", ".join(f"{name.upper()} {getattr(sizes, name)}" for name in ("tp", "pp", "cp", "dp", "ep"))
    optimizer = "distributed optimizer" if sizes.distributed_optimizer else "whole optimizer"
    return "\n".join(
        [
            f"{plan.name} on {sizes.world_size:,} GPUs: {layout}, {optimizer}",
            f"a step: {batch.global_batch_size} sequences of {batch.seq_length:,} tokens, {batch.tokens:,} in all, "
            f"{batch.num_microbatches(sizes)} micro-batches a replica, {batch.dtype}",
            f"LongAct: ratio {config.ratio:g}, {config.select}, {config.statistic}, tap {config.tap}, scope "
            f"{config.scope}, refresh interval {config.refresh_interval}, freeze {config.freeze}",
            f"what follows is of one rank: {plan.place.layers} layers, tensor-parallel rank {plan.place.tp_rank}",
        ]
    )


def _communication(plan: Plan) -> str:
    rows = [
        [
            f"{call.operation} over {call.group}",
            str(call.size),
            size(call.nbytes),
            size(call.wire_bytes),
            f"{roofline.collective_seconds(call, plan.parallel, plan.assumed) * 1e6:.0f} µs",
        ]
        for call in plan.collectives
    ]
    sent = sum(call.wire_bytes for call in plan.collectives)
    metrics = sum(call.wire_bytes for call in plan.metric_collectives)
    lines = [
        table(["a refresh communicates", "ranks", "tensor", "sent by a rank", "time"], rows),
        f"in all {size(sent)} sent by a rank; and {metrics} B for the metrics of a logged step",
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    rows = [[name, size(part.mean), size(part.most)] for name, part in plan.held.items()]
    for host, where in ((False, "on the device"), (True, "in the host's memory")):
        rows.append([f"= held {where}", size(plan.held_bytes(host=host)), ""])
    rows.append(["for the optimizer's step: masters saved", *map(size, plan.saved_masters)])
    rows.append(["for a refresh: temporaries", "", size(plan.reduction_temporaries)])
    rows.append(["for a forward: temporaries", "", size(plan.capture.temporary)])
    rows.append(["for the gradient norms: temporaries", "", size(plan.mask.temporary)])
    return table(["memory", "on average", "at most"], rows)


def _reads(plan: Plan) -> str:
    capture, mask = plan.capture, plan.mask
    rows = [
        ["Q and K activations, read once", size(capture.activations), "", "refresh"],
        ["capture, temporaries included", size(capture.traffic), f"{capture.operations:,}", "refresh"],
        ["gradients and masters", size(mask.traffic), f"{mask.operations:,}", "every"],
    ]
    return table(["memory traffic", "bytes", "kernels", "in which step"], rows)


def _share(plan: Plan) -> str:
    share = plan.share
    parts = {
        "dense step": share.dense_step_s,
        "capture": share.capture_s,
        "collectives": share.collectives_s,
        "host": share.host_s,
        "gradients and masters": share.mask_s,
    }
    rows = [[name, f"{s * 1e3:,.2f} ms", f"{s / share.dense_step_s:.3%}"] for name, s in parts.items()]
    rows += [[f"refresh interval {n}", "", f"+{share.over_dense(n):.3%}"] for n in plan.intervals]
    return table(["expected time", "a refresh step", "of the dense step"], rows)


def _training(plan: Plan) -> str:
    rows = [[name, size(nbytes)] for name, nbytes in plan.training.items() if nbytes]
    rows.append(["= in all, without LongAct and the cache of rollouts", size(sum(plan.training.values()))])
    return table(["the training itself, with full recomputation", "memory"], rows)


def _shared_prompts(saved: Savings) -> str:
    group = saved.group
    pairs = {
        "tokens of a step": ([f"{n:,}" for n in saved.tokens], saved.tokens),
        "FLOPs of a step": ([f"{n:.3g}" for n in saved.flops], saved.flops),
        "expected time of the dense step": ([f"{n:,.1f} s" for n in saved.seconds], saved.seconds),
    }
    rows = [[name, *shown, f"{apart / shared:.2f}"] for name, (shown, (apart, shared)) in pairs.items()]
    made = {
        "gathered K and V of a layer, at once": saved.gathered_at_once,
        "in all forwards of a step": saved.gathered,
        "sent to context-parallel ranks in them": saved.sent,
    }
    rows += [[name, "", size(nbytes), ""] for name, nbytes in made.items() if nbytes]
    responses = ", ".join(map(str, group.responses_of_rows))
    lines = [
        f"groups of {group.size} responses of {group.response:,} tokens to a prompt of {group.prompt:,}, in rows of "
        f"{group.row:,}: {responses} responses a row, {saved.rows:,} rows a step",
        table(["shared prompts", "apart", "shared", "apart / shared"], rows),
    ]
    return "\n".join(lines)


def _assumed(assumed: Assumptions) -> str:
    values = ", ".join(f"--{f.name.replace('_', '-')} {getattr(assumed, f.name):g}" for f in fields(assumed))
    return f"assumed: {values}"


def size(nbytes: float) -> str:
    """Bytes for reading."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"
