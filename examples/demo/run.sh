#!/usr/bin/env bash
# The demo: GRPO on needle tasks over long contexts with LongAct, on two CPU cores (TP=2 over gloo).
#
#     bash examples/demo/run.sh                  what `make demo` does: results in runs/demo
#     DENSE=1 bash examples/demo/run.sh          the same without LongAct, in runs/demo-dense
#     SEED=2 bash examples/demo/run.sh           other tasks, held-out ones too, and other rollouts
#     RANKS=1 bash examples/demo/run.sh          on one rank instead of two tensor-parallel ones
#     RUN_DIR=/tmp/run bash examples/demo/run.sh --train-iters 10     another folder; more flags are passed on
#
# Each call begins anew in runs/demo and runs/demo-dense. In a folder of yours it goes on with a run that it finds there,
# or says that it has ended; --overwrite begins anew there too.
# DEMO_DIR is the folder of the tokenizer and of the start checkpoint (default: the one of this file).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/demo/model_args.sh

SEED=${SEED:-1}
RANKS=${RANKS:-2}
ANEW=()
[[ -n ${RUN_DIR:-} ]] || ANEW=(--overwrite)
if [[ ${DENSE:-0} == 1 ]]; then
    RUN_DIR=${RUN_DIR:-runs/demo-dense}
    LONGACT_ARGS=()
else
    RUN_DIR=${RUN_DIR:-runs/demo}
    LONGACT_ARGS=(--longact --longact-ratio 0.30 --longact-refresh-interval 1)
fi

TASK_ARGS=(
    --context-lengths 128 192 256      # tokens of a prompt, drawn for each; the start model learnt at 24 to 64
    --heldout-context-lengths 128 256 384
    --max-response-length 16
    --seq-length 416                   # longest prompt plus response, rounded up
    --rl-prompts-per-eval 128          # held-out prompts for each context length
    --eval-interval 1000               # before and after only
    --expected-gain 10                 # points; the report says so if it is less
)
GRPO_ARGS=(
    --grpo-prompts-per-step 16         # prompts of a rollout batch
    --grpo-group-size 8                # responses to each
    --global-batch-size 64             # responses of an optimizer step: two steps a rollout batch
    --micro-batch-size 8
    --grpo-iterations 1                # times through a rollout batch
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28        # clip-higher, as DAPO has it
    --grpo-kl-beta 0.001               # a light pull towards the start model
    --rl-default-temperature 1.0
    --inference-max-requests 128       # responses made at once
)
TRAIN_ARGS=(
    --tensor-model-parallel-size "$RANKS"
    --train-iters 40                   # optimizer steps
    --lr 1e-4
    --lr-decay-style linear            # a constant rate lets the entropy run away after some 30 steps
    --min-lr 1e-5
    --lr-warmup-iters 4
    --weight-decay 0.01
    --clip-grad 1.0
    --seed "$SEED"
    --log-interval 1
    --pretrained-checkpoint "$DEMO_DIR/start_checkpoint"
    --load "$RUN_DIR/checkpoints"
    --save "$RUN_DIR/checkpoints"
    --save-interval 1000               # the last iteration is always saved
    --save-first-iteration
    --ckpt-format torch_dist
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --run-dir "$RUN_DIR"
)

mkdir -p "$RUN_DIR"
[[ -d .venv ]] && export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1               # one core a rank
export TORCH_CPP_LOG_LEVEL=ERROR       # gloo's warnings about host names
export PYTHONWARNINGS=ignore           # Megatron warns of each kernel library that a CPU does not have
export TORCH_LOGS=-all                 # and torch of a CUDA toolkit without a GPU
exec torchrun --standalone --nproc-per-node "$RANKS" \
    -m megatron_longact.run --cpu examples/train_grpo.py \
    "${MODEL_ARGS[@]}" "${TASK_ARGS[@]}" "${GRPO_ARGS[@]}" "${TRAIN_ARGS[@]}" ${LONGACT_ARGS[@]+"${LONGACT_ARGS[@]}"} \
    ${ANEW[@]+"${ANEW[@]}"} "$@"
