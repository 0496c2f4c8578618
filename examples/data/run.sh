#!/usr/bin/env bash
# GRPO on data sets of one's own: two JSONL files and the needle tasks, mixed. Two CPU cores, about a minute.
#
#     bash examples/data/run.sh                  results in runs/data
#     bash examples/data/run.sh --train-iters 40 more flags are passed on
#
# Made for the demo's small start model (examples/demo), which knows such sentences. docs/data.md says what each
# flag takes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/demo/model_args.sh

ANEW=()
[[ -n ${RUN_DIR:-} ]] || ANEW=(--overwrite)         # each call begins anew in runs/data, not in a folder of yours
RUN_DIR=${RUN_DIR:-runs/data}
DATA_ARGS=(
    --train-data examples/data/train.jsonl:3 needle:1   # three prompts of the file to one needle task
    --heldout-data examples/data/heldout.jsonl needle   # never trained on
    --heldout-length-edges 96 160                       # the file's prompts are counted under 96 tokens
    --curriculum 0:96 4:160                             # up to 96 tokens in rollout steps 0 to 3, then 160
    --context-lengths 80 128                            # of the needle tasks
    --heldout-context-lengths 160
    --max-response-length 16
    --seq-length 176                                    # longest prompt plus response
    --rl-prompts-per-eval 32                            # at most, for each context length
    --eval-interval 1000                                # before and after only
    --eval-samples 4                                    # beside the greedy answer, for pass@k
    --eval-pass-at 1 4
)
GRPO_ARGS=(
    --grpo-prompts-per-step 8
    --grpo-group-size 8
    --global-batch-size 64
    --micro-batch-size 8
    --grpo-iterations 1
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28
    --grpo-kl-beta 0
    --inference-max-requests 128
)
TRAIN_ARGS=(
    --tensor-model-parallel-size 2
    --train-iters 8
    --lr 1e-4
    --lr-decay-style constant
    --clip-grad 1.0
    --seed "${SEED:-1}"
    --log-interval 1
    --pretrained-checkpoint examples/demo/start_checkpoint
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --run-dir "$RUN_DIR"
)

mkdir -p "$RUN_DIR"
export PYTHONPATH="examples/data${PYTHONPATH:+:$PYTHONPATH}"   # where short_answers.py is
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore TORCH_LOGS=-all
exec torchrun --standalone --nproc-per-node 2 \
    -m megatron_longact.run --cpu examples/train_grpo.py \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${GRPO_ARGS[@]}" "${TRAIN_ARGS[@]}" --longact \
    ${ANEW[@]+"${ANEW[@]}"} "$@"
