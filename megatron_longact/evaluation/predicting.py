"""Responses to samples, chunk by chunk, with the engine that makes the rollouts of the RL program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_longact.generation.engine import Prompt, RolloutEngine
from megatron_longact.generation.sampling import Sampling
from megatron_longact.tasks.benchmark import Group, Sample
from megatron_longact.tasks.rows import Id, Row


def predict(
    groups: Sequence[Group],
    engine: RolloutEngine,
    *,
    done: set[Id],
    chunk: int,
    temperature: float,
    seed: int,
    detokenize: Callable[[list[int]], str],
) -> Iterator[tuple[str, list[Row]]]:
    """Yield the name of a group and rows of predictions, until no sample that is not in `done` is left.

    Called by all ranks with the same arguments: all get the same rows. chunk: samples that the engine is given at
    once. A group of which nothing is missing is not even made. Samples are taken in order of length: the engine
    makes batches of equal lengths, and its replicas then have equally much to do.
    """
    numbers = {each: number for number, each in enumerate(id for group in groups for id in group.ids)}

    def respond(samples: Sequence[Sample], step: int) -> list[str]:
        sampling = Sampling(
            max_response_length=max(sample.tokens_to_generate for sample in samples),
            temperature=temperature or 1.0,
            greedy=temperature == 0,
            seed=seed,
            step=step,
        )
        rollouts = engine.generate([Prompt(tuple(s.tokens), index=numbers[s.id]) for s in samples], sampling)
        return [detokenize(rollouts.response(i)) for i in range(len(samples))]

    for group in groups:
        if done.issuperset(group.ids):
            continue
        missing = sorted((s for s in group.make() if s.id not in done), key=lambda s: len(s.tokens))
        for begin in range(0, len(missing), chunk):
            samples = missing[begin : begin + chunk]
            responses = respond(samples, 0)
            if samples[0].follow_up is not None:
                samples = [s.follow_up(text) for s, text in zip(samples, responses, strict=True) if s.follow_up]
                responses = respond(samples, 1)
            yield group.name, [s.answered(text) for s, text in zip(samples, responses, strict=True)]
