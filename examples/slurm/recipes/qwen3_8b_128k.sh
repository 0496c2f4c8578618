# Qwen3-8B, GRPO over contexts of up to 128k tokens, on 8 H100s (80 GB); to be sourced by ../common.sh. As qwen3_8b.sh, but
# for what stands here: YaRN, context parallelism, longer rows. docs/slurm.md has the variables, and says what has been run.
#
#     RECIPE=qwen3_8b_128k HF_DIR=my/Qwen3-8B START=my/qwen3-8b sbatch examples/slurm/single_node.sh
#
# HF_DIR's config.json must say YaRN before it is converted (docs/checkpoints.md): the weights are the same, but whoever
# uses the trained model needs it.
#
# Memory by `python tools/plan.py --model qwen3-8b --tp 4 --cp 2 --sequence-parallel --seq-length 115712
# --global-batch-size 256 --group-size 16 --response-length 1024 --row-length 131072`: 32 GiB of training on each GPU, 40 GB of
# KV cache while responses are made.
# shellcheck shell=bash disable=SC2034     # common.sh and the other recipe read them
PROGRAM=${PROGRAM:-ours}
[[ $PROGRAM == ours ]] || die "recipe $RECIPE is for PROGRAM=ours, which shares prompts; PROGRAM is $PROGRAM"
CP=${CP:-2}                            # each GPU holds half of a row's tokens
SEQ_LENGTH=${SEQ_LENGTH:-131072}       # of a row: a prompt of 114,688 and 16 responses of 1,024 beside it
CONTEXT_LENGTHS=${CONTEXT_LENGTHS:-32768 65536 114688}
KV_CACHE_GB=${KV_CACHE_GB:-40}         # a prompt of 114,688 takes 4.2: 36 layers, K and V, 256 channels, 2 bytes
RUN_DIR=${RUN_DIR:-runs/qwen3-8b-128k}
POSITION_ARGS=(
    --position-embedding-type yarn     # from the 32,768 positions that it was made for
    --yarn-original-max-position-embeddings 32768
    --rotary-scaling-factor 4.0        # to 131,072
    --max-position-embeddings 131072
)
# shellcheck source=/dev/null
source examples/slurm/recipes/qwen3_8b.sh
