#!/usr/bin/env bash
# Qwen3-8B in NVIDIA's own RL loop (train_rl.py of NVIDIA/Megatron-LM, unedited) with LongAct, on one machine of 8 H100.
# Not run on GPUs yet: its flags are parsed and validated by Megatron in tests/test_megatron_lm.py, no more.
#
#     export MEGATRON_LM=…               # a checkout of NVIDIA/Megatron-LM, core_v0.19.0 or as docs/megatron_rl.md has it
#     export HF_DIR=… START=…            # Qwen3-8B as Hugging Face has it, and out of tools/convert_hf_to_megatron.py
#     bash examples/megatron_lm/qwen3_8b.sh
#     DRY_RUN=1 bash examples/megatron_lm/qwen3_8b.sh          prints the command, one argument a line
#     DENSE=1 bash examples/megatron_lm/qwen3_8b.sh            the same without LongAct
#     bash examples/megatron_lm/qwen3_8b.sh --train-iters 2    more flags are passed on
set -euo pipefail

DRY_RUN=${DRY_RUN:-0}
[[ $DRY_RUN == 1 ]] && HF_DIR=${HF_DIR:-HF_DIR} START=${START:-START} MEGATRON_LM=${MEGATRON_LM:-MEGATRON_LM}
MEGATRON_LM=${MEGATRON_LM:?names a checkout of NVIDIA/Megatron-LM}
HF_DIR=${HF_DIR:?names the Hugging Face folder of Qwen3-8B: its tokenizer}
START=${START:?names the Megatron checkpoint to start from, out of tools/convert_hf_to_megatron.py}
ENV_CONFIG=${ENV_CONFIG:-$MEGATRON_LM/examples/rl/environment_configs/dapo.yaml}
RUN_DIR=${RUN_DIR:-runs/megatron-lm-qwen3-8b}
GPUS=${GPUS:-8}
TP=${TP:-4}                            # ranks that share each layer
CP=${CP:-1}                            # ranks that share each sequence; what is left is data parallel
SEQ_LENGTH=${SEQ_LENGTH:-32768}        # prompt plus response

# The loop of 0.19 gives every rank whole sequences, whatever --context-parallel-size says, and does not stop.
if ((CP > 1)) && [[ -d $MEGATRON_LM ]] && ! grep -q context_parallel "$MEGATRON_LM/megatron/rl/rl_utils.py"; then
    echo "${0##*/}: the RL loop of $MEGATRON_LM does not split sequences: set CP=1, or take a Megatron-LM after 0.19" >&2
    exit 2
fi

MODEL_ARGS=(
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8               # key-value heads
    --kv-channels 128                  # channels of a head: W_Q has 4096 rows, W_K 1024
    --qk-layernorm
    --position-embedding-type rope
    --rotary-base 1000000
    --max-position-embeddings 40960
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$HF_DIR"
    --vocab-size 151936
    --make-vocab-size-divisible-by 32  # times TP 4: no row is added
)
LAYOUT_ARGS=(
    --tensor-model-parallel-size "$TP"
    --context-parallel-size "$CP"
    --sequence-parallel                # norms on 1/TP of the tokens each
    --use-distributed-optimizer        # data-parallel ranks share masters and moments
    --bf16                             # weights; masters, moments and gradients are fp32
    --transformer-impl transformer_engine
    --attention-backend flash
    --attention-softmax-in-fp32
    --te-rng-tracker                   # its inference graphs ask for it
    --recompute-granularity full       # keep each layer's input and make the rest again in the backward
    --recompute-method uniform
    --recompute-num-layers 1
)
RL_ARGS=(
    --perform-rl-step
    --langrl-env-config "$ENV_CONFIG"  # its environments: a file names agents of megatron.rl and how often each is asked
    --grpo-prompts-per-step 64         # prompts of a rollout batch
    --grpo-group-size 16               # responses to each
    --grpo-iterations 1                # times through a rollout batch
    --global-batch-size 256            # responses of an optimizer step: four steps a rollout batch
    --micro-batch-size 1               # its packed attention takes one row
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.2
    --grpo-kl-beta 0                   # no pull towards the reference
    --rl-use-sequence-packing          # short responses share a row, instead of padding up to --seq-length
    --seq-length "$SEQ_LENGTH"
    --inference-max-seq-length "$SEQ_LENGTH"
    --inference-max-requests 32        # responses made at once by a model replica
    --inference-dynamic-batching-buffer-size-gb 20      # of key-value cache on each GPU
    --cuda-graph-impl local            # in rollouts only: without --rl-training-cuda-graphs training has none
    --rl-persist-cuda-graphs           # made once; the key-value cache stays where it is
)
TRAIN_ARGS=(
    --train-iters 400                  # optimizer steps
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.999
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.01                # frozen rows do not decay: --longact-freeze strict
    --clip-grad 1.0
    --eval-interval 40
    --rl-prompts-per-eval 32
)
RUN_ARGS=(
    --pretrained-checkpoint "$START"   # the first start, and the reference policy at every start
    --load "$RUN_DIR/checkpoints"      # what a restart goes on from, LongAct's state included
    --save "$RUN_DIR/checkpoints"
    --save-interval 16                 # a multiple of the steps of a rollout batch
    --ckpt-format torch_dist
    --dist-ckpt-optim-fully-reshardable
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --log-interval 1
)
LONGACT_ARGS=(
    --longact
    --longact-ratio 0.30               # share of Q rows, and of K rows, that are updated
    --longact-refresh-interval 1       # a selection in every optimizer step, from its own forward passes
)
[[ ${DENSE:-0} == 1 ]] && LONGACT_ARGS=()

export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"     # its agents are looked up from here, in workers too
COMMAND=(
    torchrun --standalone --nproc-per-node "$GPUS"
    -m megatron_longact.run "$MEGATRON_LM/train_rl.py"
    "${MODEL_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${RL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${RUN_ARGS[@]}"
    ${LONGACT_ARGS[@]+"${LONGACT_ARGS[@]}"} "$@"
)
if [[ $DRY_RUN == 1 ]]; then
    printf '%s\n' "${COMMAND[@]}"
else
    mkdir -p "$RUN_DIR"
    exec "${COMMAND[@]}"
fi
