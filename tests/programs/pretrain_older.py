"""`pretrain_plain.py` for the Megatrons before 0.19, whose `pretrain` wants a function that builds the model."""

import inspect
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args


class CountingSequences(torch.utils.data.Dataset):
    """Sequences that count upwards in steps: sample `i` starts at `i` and goes on by 1 + i % 3."""

    def __init__(self, num_samples: int, *, seq_length: int, vocab_size: int) -> None:
        self.num_samples, self.seq_length, self.vocab_size = num_samples, seq_length, vocab_size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = (index + torch.arange(self.seq_length + 1) * (1 + index % 3)) % self.vocab_size
        return {"tokens": text[:-1], "labels": text[1:]}


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    vocab_size = get_tokenizer().vocab_size - 1
    return [CountingSequences(n, seq_length=args.seq_length, vocab_size=vocab_size) if n else None for n in num_samples]


datasets_provider.is_distributed = True


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **unused):
    args = get_args()
    return GPTModel(
        config=config or core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm"),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
    )


def loss_func(output_tensor):
    loss = output_tensor.float().sum()
    num_tokens = torch.tensor(output_tensor.numel(), dtype=torch.int, device=output_tensor.device)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels = batch["tokens"].cuda(), batch["labels"].cuda()
    b, s = tokens.shape
    position_ids = torch.arange(s, device=tokens.device).expand(b, s)
    attention_mask = torch.ones(1, 1, s, s, dtype=torch.bool, device=tokens.device).triu(1)
    return model(tokens, position_ids, attention_mask, labels=labels), partial(loss_func)


def main():
    own = (datasets_provider, model_provider, ModelType.encoder_or_decoder, forward_step)
    if "cfg_container" not in inspect.signature(pretrain).parameters:  # 0.17
        pretrain(*own)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    container = pretrain_cfg_container_from_args
    arguments = parse_and_validate_args()
    model_config = [core_transformer_config_from_args(arguments)] * (len(inspect.signature(container).parameters) - 1)
    pretrain(container(arguments, *model_config), *own)


if __name__ == "__main__":
    main()
