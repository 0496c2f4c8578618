"""A plugin file for ms-swift: `examples/integrations/swift_plugin.py` with settings of its own, and GRPO without vLLM.

Where ms-swift would load the weights into vLLM, they are exported under their Hugging Face names and dropped; where it
would ask vLLM, an answer is ready made. Model and optimizer are offloaded meanwhile, as beside vLLM. All else is its.
"""

import random
from typing import Any

import swift.megatron.trainers
import swift_plugin
from swift.infer_engine.protocol import (
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    RolloutOutput,
    UsageInfo,
)
from swift.megatron.trainers import MegatronGRPOTrainer

from megatron_longact import LongActConfig

swift_plugin.CONFIG = LongActConfig(ratio=0.25, ema=0.5, refresh_interval=2)
WORDS = ["four", "two", "and", "the", "answer", "is", "what"]


class WithoutVLLM(MegatronGRPOTrainer):  # type: ignore[misc]
    """Its GRPO trainer; what would call vLLM does not."""

    def _init_rollout_engine(self) -> None:
        self.args.use_vllm = False  # the part of this method that starts vLLM
        super()._init_rollout_engine()
        self.args.use_vllm, self.enable_offload = True, True

    def _move_model_to_vllm(self) -> None:
        names = [name for name, _ in self.bridge.export_weights(self.unwrapped_models)]
        assert "model.layers.1.self_attn.q_proj.weight" in names

    def _rollout(self, samples: list[Any]) -> list[Any]:
        return [_answer(self.template.tokenizer, random.Random(f"{self._step} {i}")) for i in range(len(samples))]


def _answer(tokenizer: Any, draw: random.Random) -> Any:
    text = " ".join(draw.choices(WORDS, k=draw.randint(6, 12)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    message = ChatMessage(role="assistant", content=text)
    choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason="stop", token_ids=ids)
    response = ChatCompletionResponse(model="", choices=[choice], usage=UsageInfo(0, 0, 0))
    return RolloutOutput(response=response, response_token_ids=[ids])


swift.megatron.trainers.MegatronGRPOTrainer = WithoutVLLM
