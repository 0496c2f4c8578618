# Flags of examples/train_grpo.py for a model of several billion parameters; to be sourced by a recipe that has set
# MODEL_ARGS, TP, PP, CP, SEQ_LENGTH, RUN_DIR. Not run yet.
# shellcheck shell=bash disable=SC2034     # common.sh reads them
[[ $DRY_RUN == 1 ]] && HF_DIR=${HF_DIR:-HF_DIR} START=${START:-START}
SAVE=${SAVE:-$RUN_DIR/checkpoints}
HF_DIR=${HF_DIR:?names the Hugging Face folder of the model: tokenizer, and shapes for the preflight}
START=${START:?names the Megatron checkpoint to start from, out of tools/convert_hf_to_megatron.py}
read -ra TRAIN_DATA <<<"${TRAIN_DATA:-needle}"          # JSONL files, docs/data.md; needle: the built-in needle tasks
read -ra HELDOUT_DATA <<<"${HELDOUT_DATA:-needle}"
read -ra CONTEXT_LENGTHS <<<"${CONTEXT_LENGTHS:-8192 16384 28672}"
STOP_CODE=75                                            # what it ends with after a signal
PREFLIGHT_ARGS=(
    --require-gpu --gpu "${GPU:-H100}" --min-gpu-memory-gib "${MIN_GPU_MEMORY_GIB:-75}"
    --hf-dir "$HF_DIR"                                  # its tensors against its config.json, and that against the flags
    --min-free-gb "$MIN_FREE_GB" --min-write-mb-s "${MIN_WRITE_MB_S:-100}"
    --all-reduce-mib 1024 --min-all-reduce-gb-s "$MIN_ALL_REDUCE"
)

LAYOUT_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"      # ranks that hold a part of each row, and are replicas while responses are made
    --sequence-parallel                # between layers each TP rank has 1/TP of the tokens
    --use-distributed-optimizer        # replicas share masters and moments
    --overlap-grad-reduce              # gradients are added up while the backward goes on
    --overlap-param-gather             # and updated weights gathered while the forward does
)
PRECISION_ARGS=(
    --bf16                             # weights; masters, moments and gradients are fp32
    --transformer-impl transformer_engine
    --attention-backend flash
    --attention-softmax-in-fp32
    --accumulate-allreduce-grads-in-fp32
    --recompute-granularity full       # keep each layer's input and make the rest again in the backward
    --recompute-method uniform
    --recompute-num-layers 1
)
if [[ ${FP8:-0} == 1 ]]; then
    PRECISION_ARGS+=(
        --fp8-format hybrid            # e4m3 forward, e5m2 backward
        --fp8-recipe blockwise         # a scale for each 128 x 128 block of weights
    )
fi
TASK_ARGS=(
    --train-data "${TRAIN_DATA[@]}"
    --heldout-data "${HELDOUT_DATA[@]}"
    --drop-overlong-prompts            # leave out, and count, what does not fit
    --context-lengths "${CONTEXT_LENGTHS[@]}"           # tokens of a needle prompt, drawn for each
    --max-response-length 4096         # the longest prompt of a data set is the rest of --seq-length
    --seq-length "$SEQ_LENGTH"
    --eval-interval 40                 # optimizer steps: every ten rollout batches
    --rl-prompts-per-eval 32           # held-out prompts for each context length
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$HF_DIR"
)
ROLLOUT_ARGS=(
    --grpo-prompts-per-step 64         # prompts of a rollout batch
    --grpo-group-size 16               # responses to each
    --rl-default-temperature 1.0
    --inference-dynamic-batching       # paged KV cache, prompts of any length side by side; needs flash-attn
    --inference-dynamic-batching-buffer-size-gb "${KV_CACHE_GB:-20}"    # of KV cache on each GPU
    --inference-dynamic-batching-prefix-caching         # a group's prompt is there once
    --inference-dynamic-batching-max-tokens "$SEQ_LENGTH"               # of one step: the longest prompt must fit in it
    --inference-max-requests 64        # responses made at once by a model replica
    --rl-kv-cache-management-mode recompute             # the cache's memory is free while the model trains
)
OBJECTIVE_ARGS=(
    --grpo-iterations 1                # times through a rollout batch
    --global-batch-size 256            # responses of an optimizer step: four steps a rollout batch
    --micro-batch-size 1
    --rl-use-sequence-packing          # several responses share a row of --seq-length tokens,
    --shared-prompts                   # behind one copy of their prompt
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28        # clip-higher, as DAPO has it
    --grpo-kl-beta 0                   # no reference model
    --rl-inference-logprobs-is-correction               # weigh tokens by trainer over rollout engine
)
TRAIN_ARGS=(
    --train-iters "${TRAIN_ITERS:-400}"                 # optimizer steps: a hundred rollout batches
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.999
    --lr 1e-6
    --lr-decay-style constant
    --weight-decay 0.01
    --clip-grad 1.0
    --seed "${SEED:-1}"
)
RUN_ARGS=(
    --pretrained-checkpoint "$START"   # where the first start begins
    --load "$SAVE"                     # and every later one: the last complete checkpoint
    --save "$SAVE"
    --save-interval 20                 # optimizer steps
    --ckpt-format torch_dist           # loads at any layout,
    --dist-ckpt-optim-fully-reshardable                 # the optimizer too
    --exit-signal-handler              # SIGUSR1 or SIGTERM: finish the step, save, end with exit code 75
    --exit-signal SIGUSR1
    --distributed-timeout-minutes 60   # a collective that waits so long ends the run; longer than the longest rollout
    --log-interval 1
    --log-throughput
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --run-dir "$RUN_DIR"
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
    examples/train_grpo.py "${MODEL_ARGS[@]}" "${LAYOUT_ARGS[@]}" "${PRECISION_ARGS[@]}" "${TASK_ARGS[@]}"
    "${ROLLOUT_ARGS[@]}" "${OBJECTIVE_ARGS[@]}" "${TRAIN_ARGS[@]}" "${RUN_ARGS[@]}" ${LONGACT_ARGS[@]+"${LONGACT_ARGS[@]}"}
)
