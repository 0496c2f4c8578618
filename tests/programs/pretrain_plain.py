"""An ordinary pretraining program on `megatron.training`, with synthetic data; it knows of nothing but Megatron."""

from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain


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
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    arguments = parse_and_validate_args()
    pretrain(
        pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
