#!/usr/bin/env bash
# Makes the demo's tokenizer and start checkpoint again from nothing, in a few minutes on two idle cores:
#
#   bash examples/demo/make_start_checkpoint.sh [OUTPUT_DIR]
#
# OUTPUT_DIR (default: examples/demo/start_checkpoint) must not exist yet. The supervised training stays within 64
# tokens; at the demo's 128 to 512 the model retrieves some needles and misses others, which is the room RL has.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."       # relative paths from here on: the checkpoint remembers its arguments
OUTPUT=${1:-examples/demo/start_checkpoint}
PYTHON=${PYTHON:-.venv/bin/python}
RANKS=${RANKS:-2}                               # data-parallel ranks
export DEMO_DIR=examples/demo OMP_NUM_THREADS=1

if [ -e "$OUTPUT" ]; then echo "$OUTPUT exists: remove it first" >&2; exit 1; fi

"$PYTHON" examples/demo/make_tokenizer.py
. examples/demo/model_args.sh

DATA_ARGS=(
    # ITERATIONS:LENGTHS:TASKS. With little haystack the model learns to find the key and copy its number.
    --phase "300:24,28:single,multikey,multivalue,multiquery"
            "500:32,48,64:single,multikey,multivalue,multiquery"
    --prompt-loss-weight 0.1
    --seq-length 64
    --dataloader-type single                    # samples in order: the phases count on it
    --num-workers 0
    --no-create-attention-mask-in-dataloader
    --eval-iters 0
    --eval-interval 1000000
)
TRAINING_ARGS=(
    --train-iters 800
    --global-batch-size 64
    --micro-batch-size $((64 / RANKS))
    --init-method-std 0.08                      # about 1 / sqrt(hidden size); 0.02 learns these tasks much later
    --lr 3e-3
    --lr-warmup-iters 50
    --lr-decay-style WSD
    --lr-decay-iters 800
    --lr-wsd-decay-iters 200
    --min-lr 3e-5
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1
    --seed 1234
)
OUTPUT_ARGS=(
    --save "$OUTPUT"
    --save-interval 800
    --ckpt-format torch_dist
    --no-save-optim
    --no-save-rng
    --log-interval 50
)

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m megatron_longact.run --cpu \
    examples/demo/train_sft.py "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${OUTPUT_ARGS[@]}" </dev/null

du -sh "$OUTPUT"
