# Qwen3-8B, GRPO over contexts of up to 32k tokens, on 8 H100s (80 GB); to be sourced by ../common.sh.
# docs/slurm.md has the variables, and says what has been run.
#
#     python tools/convert_hf_to_megatron.py --hf-dir my/Qwen3-8B --save my/qwen3-8b
#     HF_DIR=my/Qwen3-8B START=my/qwen3-8b sbatch examples/slurm/single_node.sh
#
# PROGRAM=ours         examples/train_grpo.py, TP 4 x DP 2, a prompt computed once for the responses beside it
# PROGRAM=megatron_lm  NVIDIA's train_rl.py out of the checkout MEGATRON_LM, TP 4 x CP 2: it must split sequences
#
# Memory by `python tools/plan.py --model qwen3-8b --tp 4 --dp 2 --sequence-parallel --seq-length 32768
# --global-batch-size 256 --group-size 16 --response-length 1024 --row-length 40960`: 27 GiB of training on each GPU, 20 GB of
# KV cache while responses are made; docs/planning.md has what sharing saves.
# shellcheck shell=bash disable=SC2034     # common.sh reads them
PROGRAM=${PROGRAM:-ours}
TP=${TP:-4}                            # 4 of a node's 8 GPUs hold a layer: 4 GB of weights, 8 GB of fp32 gradients each
PP=${PP:-1}                            # all layers on every GPU
if [[ $PROGRAM == megatron_lm ]]; then
    CP=${CP:-2}                        # each GPU holds half of a sequence
    SEQ_LENGTH=${SEQ_LENGTH:-32768}    # longest prompt plus response
else
    CP=${CP:-1}
    SEQ_LENGTH=${SEQ_LENGTH:-40960}    # of a row: the longest prompt, 28,672, and room for several responses beside it
fi
RUN_DIR=${RUN_DIR:-runs/qwen3-8b-$PROGRAM}
MIN_FREE_GB=${MIN_FREE_GB:-250}        # two checkpoints: 16 GB of weights and 98 GB of optimizer each
MIN_ALL_REDUCE=${MIN_ALL_REDUCE:-100}  # GB/s of an all-reduce over NVLink: a floor, not what it should reach

[[ -v POSITION_ARGS ]] || POSITION_ARGS=(--position-embedding-type rope --max-position-embeddings 40960)
MODEL_ARGS=(
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --kv-channels 128                  # a head's channels; not hidden / heads in every Qwen3
    --group-query-attention            # query heads share keys and values,
    --num-query-groups 8               # 4 of them a group: 4096 + 1024 + 1024 rows of linear_qkv
    --qk-layernorm                     # a norm of Q and K of each head, before RoPE
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu                           # gated MLP
    --disable-bias-linear              # no biases
    "${POSITION_ARGS[@]}"
    --rotary-base 1000000
    --rotary-percent 1.0               # all channels of a head turn
    --untie-embeddings-and-output-weights      # the output layer has weights of its own
    --attention-dropout 0
    --hidden-dropout 0
    --vocab-size 151936                # rows of the embedding; the tokenizer uses fewer
    --make-vocab-size-divisible-by 32  # times TP 4: no row is added
)
# shellcheck source=/dev/null
source "examples/slurm/recipes/program_$PROGRAM.sh"
