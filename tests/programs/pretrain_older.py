"""`pretrain_plain.py` for the Megatrons before 0.19, whose `pretrain` wants a function that builds the model."""

import inspect

from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import get_args, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from pretrain_plain import datasets_provider, forward_step


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
