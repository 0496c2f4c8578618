# Flags of NVIDIA's train_rl.py, unedited, with LongAct; to be sourced by a recipe that has set MODEL_ARGS, TP, PP, CP,
# SEQ_LENGTH, RUN_DIR. Not run yet. docs/megatron_rl.md: that program with LongAct;
# examples/megatron_lm/qwen3_8b.sh: without Slurm.
# shellcheck shell=bash disable=SC2034     # common.sh reads them
[[ $DRY_RUN == 1 ]] && HF_DIR=${HF_DIR:-HF_DIR} START=${START:-START} MEGATRON_LM=${MEGATRON_LM:-MEGATRON_LM}
SAVE=${SAVE:-$RUN_DIR/checkpoints}
MEGATRON_LM=${MEGATRON_LM:?names a checkout of NVIDIA/Megatron-LM}
HF_DIR=${HF_DIR:?names the Hugging Face folder of the model: tokenizer, and shapes for the preflight}
START=${START:?names the Megatron checkpoint to start from, out of tools/convert_hf_to_megatron.py}
ENV_CONFIG=${ENV_CONFIG:-$MEGATRON_LM/examples/rl/environment_configs/dapo.yaml}
STOP_CODE=0                            # train_rl.py ends with 0 after a signal too
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"     # megatron.rl is in the checkout alone
RECIPE_ENVIRONMENT=PYTHONPATH

[[ $DRY_RUN == 1 || -f $MEGATRON_LM/train_rl.py ]] || die "MEGATRON_LM is $MEGATRON_LM, which has no train_rl.py"
# The loop of release 0.19 gives every rank the whole sequence, whatever --context-parallel-size says, and does not stop.
if [[ -d $MEGATRON_LM ]] && ((CP > 1)) && ! grep -q context_parallel "$MEGATRON_LM/megatron/rl/rl_utils.py"; then
    die "the RL loop of $MEGATRON_LM does not split sequences: set CP=1, or take a Megatron-LM that does (after 0.19)"
fi
PREFLIGHT_ARGS=(
    --require-gpu --gpu "${GPU:-H100}" --min-gpu-memory-gib "${MIN_GPU_MEMORY_GIB:-75}"
    --hf-dir "$HF_DIR"                 # its tensors against its config.json, and that against the flags
    --min-free-gb "$MIN_FREE_GB" --min-write-mb-s "${MIN_WRITE_MB_S:-100}"
    --all-reduce-mib 1024 --min-all-reduce-gb-s "$MIN_ALL_REDUCE"
)

LAYOUT_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --sequence-parallel                # norms on 1/TP of the tokens each
    --use-distributed-optimizer        # replicas share masters and moments
)
PRECISION_ARGS=(
    --bf16                             # weights; masters, moments and gradients are fp32
    --transformer-impl transformer_engine
    --attention-backend flash
    --attention-softmax-in-fp32
    --accumulate-allreduce-grads-in-fp32
    --te-rng-tracker                   # its loop asks for it
    --recompute-granularity full       # keep each layer's input and make the rest again in the backward
    --recompute-method uniform
    --recompute-num-layers 1
)
ROLLOUT_ARGS=(
    --perform-rl-step                  # its RL loop
    --langrl-env-config "$ENV_CONFIG"  # its environments
    --grpo-prompts-per-step 64         # prompts of a rollout batch
    --grpo-group-size 16               # responses to each
    --inference-dynamic-batching-buffer-size-gb 20      # of KV cache on each GPU
    --inference-max-seq-length "$SEQ_LENGTH"
    --inference-max-requests 32        # responses made at once by a model replica
    --rl-use-sequence-packing          # short responses share a row of --seq-length tokens
    --seq-length "$SEQ_LENGTH"
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$HF_DIR"
)
OBJECTIVE_ARGS=(
    --grpo-iterations 1                # times through a rollout batch
    --global-batch-size 256            # responses of an optimizer step: four steps a rollout batch
    --micro-batch-size 1
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28        # clip-higher, as DAPO has it
    --grpo-kl-beta 0                   # no reference model
    --calculate-per-token-loss         # each token counts alike
)
TRAIN_ARGS=(
    --mock-data                        # it has prompts of its own and reads no data set
    --train-iters "${TRAIN_ITERS:-400}"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.999
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.01
    --clip-grad 1.0
    --seed "${SEED:-1}"
    --eval-interval 40
    --rl-prompts-per-eval 32
)
RUN_ARGS=(
    --pretrained-checkpoint "$START"   # where the first start begins
    --load "$SAVE"                     # and every later one: the last complete checkpoint; no --finetune, which begins anew
    --save "$SAVE"
    --save-interval 20                 # a multiple of the optimizer steps of a rollout batch: it keeps no rollouts
    --ckpt-format torch_dist           # loads at any layout,
    --dist-ckpt-optim-fully-reshardable                 # the optimizer too
    --exit-signal-handler              # SIGUSR1: finish the step, save, end
    --exit-signal SIGUSR1
    --distributed-timeout-minutes 60   # a collective that waits so long ends the run; longer than the longest rollout
    --log-interval 1
    --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard"
)
LONGACT_ARGS=()
if [[ ${DENSE:-0} != 1 ]]; then
    LONGACT_ARGS=(
        --longact
        --longact-ratio 0.30           # share of the Q rows, and of the K rows, that are updated
        --longact-refresh-interval 1   # chosen anew in each step, from its own activations
    )
fi
RANK_COMMAND=(
    "$MEGATRON_LM/train_rl.py" "${MODEL_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${PRECISION_ARGS[@]}" "${ROLLOUT_ARGS[@]}"
    "${OBJECTIVE_ARGS[@]}" "${TRAIN_ARGS[@]}" "${RUN_ARGS[@]}" ${LONGACT_ARGS[@]+"${LONGACT_ARGS[@]}"}
)
