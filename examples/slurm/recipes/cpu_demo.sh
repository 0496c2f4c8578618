# The demo's model on two CPU ranks (TP 2 over gloo), a checkpoint at the end only; to be sourced by ../common.sh.
# shellcheck shell=bash disable=SC2034     # common.sh reads them
source examples/demo/model_args.sh

RUN_DIR=${RUN_DIR:-runs/slurm-demo}
SAVE=$RUN_DIR/checkpoints
STOP_CODE=75                           # what our RL program ends with after a signal
PREFLIGHT_ARGS=()
export PYTHONWARNINGS=ignore TORCH_LOGS=-all TORCH_CPP_LOG_LEVEL=ERROR     # of kernels that a CPU does not have
RECIPE_ENVIRONMENT="PYTHONWARNINGS TORCH_LOGS TORCH_CPP_LOG_LEVEL"
RANK_COMMAND=(
    --cpu examples/train_grpo.py
    "${MODEL_ARGS[@]}"
    --tensor-model-parallel-size 2
    --context-lengths 48 64            # tokens of a prompt
    --max-response-length 16
    --seq-length 80                    # longest prompt plus response
    --rl-prompts-per-eval 8
    --eval-interval 1000               # before and after only
    --grpo-prompts-per-step 4
    --grpo-group-size 4
    --global-batch-size 8              # two optimizer steps a rollout batch
    --micro-batch-size 8
    --grpo-iterations 1
    --grpo-kl-beta 0
    --inference-max-requests 16
    --train-iters "${TRAIN_ITERS:-20}"
    --lr 1e-4
    --lr-decay-style constant
    --log-interval 1
    --seed "${SEED:-1}"
    --pretrained-checkpoint "$DEMO_DIR/start_checkpoint"
    --load "$SAVE"
    --save "$SAVE"
    --save-interval 1000
    --ckpt-format torch_dist
    --run-dir "$RUN_DIR"
    --exit-signal-handler              # a signal: finish the step, save, end with exit code 75
    --exit-signal SIGUSR1
    --longact
)
