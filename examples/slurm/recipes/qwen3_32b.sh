# Qwen3-32B, GRPO over contexts of up to 32k tokens, on 64 H100s (80 GB); to be sourced by ../common.sh.
# docs/slurm.md has the variables, and says what has been run.
#
#     python tools/convert_hf_to_megatron.py --hf-dir my/Qwen3-32B --save my/qwen3-32b
#     HF_DIR=my/Qwen3-32B START=my/qwen3-32b sbatch examples/slurm/multi_node.sh
#
# PROGRAM=ours         examples/train_grpo.py, TP 8 x DP 8, a prompt computed once for the responses beside it
# PROGRAM=megatron_lm  NVIDIA's train_rl.py out of the checkout MEGATRON_LM, TP 8 x CP 2 x DP 4: it must split sequences
# shellcheck shell=bash disable=SC2034     # common.sh reads them
PROGRAM=${PROGRAM:-ours}
TP=${TP:-8}                            # a node's 8 GPUs hold a layer: 8 GB of weights, 16 GB of fp32 gradients each
PP=${PP:-1}                            # all layers on every GPU
if [[ $PROGRAM == megatron_lm ]]; then
    CP=${CP:-2}                        # each GPU holds half of a sequence
    SEQ_LENGTH=${SEQ_LENGTH:-32768}    # longest prompt plus response
else
    CP=${CP:-1}
    SEQ_LENGTH=${SEQ_LENGTH:-40960}    # of a row: the longest prompt, 28,672, and room for several responses beside it
fi
RUN_DIR=${RUN_DIR:-runs/qwen3-32b-$PROGRAM}
MIN_FREE_GB=${MIN_FREE_GB:-1000}       # two checkpoints: 66 GB of weights and 393 GB of optimizer each
MIN_ALL_REDUCE=${MIN_ALL_REDUCE:-20}   # GB/s of an all-reduce between nodes: a floor; 400 Gb/s a GPU are 50

MODEL_ARGS=(
    --num-layers 64
    --hidden-size 5120
    --ffn-hidden-size 25600
    --num-attention-heads 64
    --kv-channels 128                  # a head's channels; not hidden / heads
    --group-query-attention            # query heads share keys and values,
    --num-query-groups 8               # 8 of them a group: 8192 + 1024 + 1024 rows of linear_qkv
    --qk-layernorm                     # a norm of Q and K of each head, before RoPE
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu                           # gated MLP
    --disable-bias-linear              # no biases
    --position-embedding-type rope
    --rotary-base 1000000
    --rotary-percent 1.0               # all channels of a head turn
    --max-position-embeddings 40960
    --untie-embeddings-and-output-weights      # the output layer has weights of its own
    --attention-dropout 0
    --hidden-dropout 0
    --vocab-size 151936                # rows of the embedding; the tokenizer uses fewer
    --make-vocab-size-divisible-by 16  # times TP 8: no row is added
)
# shellcheck source=/dev/null
source "examples/slurm/recipes/program_$PROGRAM.sh"
