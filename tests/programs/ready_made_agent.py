"""An agent and an inference interface of NVIDIA's `megatron.rl` that hand out `ready_made_rollouts`."""

import multiprocessing
from types import SimpleNamespace
from typing import Any

from megatron.rl.agent import api
from megatron.rl.agent.api import GroupedRolloutGenerator, RolloutGenerator, TokenRollout
from megatron.rl.inference import ReturnsRaw, ReturnsTokens
from pydantic import Field
from torch import distributed

from tests.programs.ready_made_rollouts import sample


class NoEngine(ReturnsTokens, ReturnsRaw):
    """Stands where the inference engine would: knows the iteration, generates nothing."""

    iteration: int = 0
    finished: dict[str, Any] = Field(default_factory=dict)

    def merge_global_request_ledgers(self) -> dict[str, Any]:
        """For releases after 0.19: what the engine knows of each response, on all ranks."""
        ledgers = [self.finished]
        distributed.broadcast_object_list(ledgers, src=0)
        self.finished = {}
        return ledgers[0]

    def set_generation_epoch(self, generation_epoch: int) -> None:
        self.iteration = generation_epoch

    async def resume(self) -> None: ...

    async def suspend(self) -> None: ...

    async def kill(self) -> None:
        """The last thing before its `os._exit`, which would leave the checkpoint writer's process behind."""
        for process in multiprocessing.active_children():
            process.terminate()


class ReadyMadeAgent(RolloutGenerator, GroupedRolloutGenerator):
    """Answers the n-th request of an iteration with the n-th group of it."""

    env_id: str = "ready-made"
    groups_given: int = 0

    def _group(self, request: Any) -> list[TokenRollout]:
        group, self.groups_given = self.groups_given % request.num_groups, self.groups_given + 1
        engine = request.inference_interface
        group_of = [rollout(engine.iteration, group, member) for member in range(request.rollouts_per_group)]
        for ready in group_of:
            engine.finished[ready.completion_ids[0]] = SimpleNamespace(
                policy_epoch=ready.policy_epoch[0], kv_cache_epoch=ready.kv_cache_epoch[0], num_evictions=0
            )
        return group_of

    async def prepare_group_rollout(self, request: Any) -> Any:
        members = iter(self._group(request))

        async def run_episode() -> Any:
            return api.EpisodeResult(responses=[], conversation=[])

        async def build_rollout(episode: Any) -> TokenRollout:
            return next(members)

        return api.GroupRolloutParams(run_episode=run_episode, build_rollout=build_rollout)

    async def get_reward_rollouts(self, request: Any) -> list[TokenRollout]:
        raise NotImplementedError

    async def get_rollout_response(self, request: Any, inference_request: Any) -> Any:
        raise NotImplementedError


def rollout(iteration: int, group: int, member: int) -> TokenRollout:
    """A sample as `megatron.rl` has it, of one turn."""
    ready = sample(iteration, group, member)
    prompt, response = len(ready.prompt), len(ready.response)
    return TokenRollout(
        trajectory=[ready.tokens],
        generation_mask=[[False] * prompt + [True] * response],
        logprobs=[[-7.0] * response],
        reward=ready.reward,
        env_id="ready-made",
        problem_id=f"{group}",
        completion_ids=[f"{iteration} {group} {member}"],
        policy_epoch=[[(0, iteration)]],
        kv_cache_epoch=[[(0, iteration)]],
        num_evictions=[0],
    )
