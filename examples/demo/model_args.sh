# The demo model, Qwen3-shaped and 0.7 M parameters small; to be sourced. The one place where its flags stand.
# DEMO_DIR may name another folder that holds tokenizer.model.
# shellcheck shell=bash disable=SC2034    # the scripts that source it read MODEL_ARGS
DEMO_DIR=${DEMO_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}

MODEL_ARGS=(
    # grouped-query attention: 4 query heads of 32 channels, 2 key-value groups
    --num-layers 3
    --hidden-size 128
    --ffn-hidden-size 384
    --num-attention-heads 4
    --kv-channels 32
    --group-query-attention
    --num-query-groups 2
    --qk-layernorm
    --position-embedding-type rope
    --rotary-base 10000
    --max-position-embeddings 1024
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --attention-dropout 0
    --hidden-dropout 0
    # 1024 pieces; the embedding is also the output layer, the default of megatron.training
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$DEMO_DIR/tokenizer.model"
    --make-vocab-size-divisible-by 128
)
