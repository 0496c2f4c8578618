#!/usr/bin/env bash
# Which rows should be updated? RL on RULER's tasks with a language model that people use, SmolLM2-135M-Instruct: each
# arm with each seed, one after the other. A run that broke off goes on when this is called again; one that ended stays.
#
#     bash examples/smollm2/rl.sh                           results in runs/smollm2-rl; on two CPU cores, days
#     ARMS="dense high" SEEDS="1 2" bash examples/smollm2/rl.sh --train-iters 10       smaller; flags go to every run
#     OBJECTIVES="dapo kl_cov" ARMS="dense high low" bash examples/smollm2/rl.sh       other objectives than grpo
#     MINUTES=90 bash examples/smollm2/rl.sh                each run saves and pauses after so long, and the next begins
#     JOBS=2 nice -n 19 bash examples/smollm2/rl.sh         two runs at a time
#     python tools/report_ablation.py runs/smollm2-rl       table, paired differences, picture
#     MODEL=FOLDER GPUS=1 bash examples/smollm2/rl.sh       another model (a Hugging Face folder), on one GPU
#
# Arms: dense updates every row; high is LongAct; low, random and gradient choose other rows (docs/ablation.md), high-fixed
# keeps the first selection. A seed sets the tasks, the held-out ones too, and the rollouts, alike for all arms.
# Objectives: grpo takes one optimizer step a rollout batch; dapo and kl_cov two, so that their clip and penalty act.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OUT=${OUT:-runs/smollm2-rl}
OBJECTIVES=${OBJECTIVES:-grpo}
ARMS=${ARMS:-dense high low random gradient high-fixed}
SEEDS=${SEEDS:-1 2}
JOBS=${JOBS:-1}                            # runs at a time; each takes 8 GB
export GPUS=${GPUS:-0}                     # of a run; 0: one rank on the CPU
export MINUTES=${MINUTES:-0}               # 0: no end
export HF_DIR=${MODEL:-runs/smollm2/SmolLM2-135M-Instruct}
export START=${START:-runs/smollm2/megatron}
[[ -z ${MODEL:-} ]] || START=$OUT/start
[[ -d .venv ]] && export PATH="$PWD/.venv/bin:$PATH"

TASKS=${TASKS:-niah_multikey_1,niah_multikey_2}          # RULER's, those that there is something to learn in
FLAGS=(
    --train-data "ruler:$TASKS"
    --context-lengths 512                  # tokens of prompt and response
    --heldout-context-lengths 512 1024
    --max-response-length 24
    --seq-length 1024
    --rl-prompts-per-eval 32               # held-out prompts of each length
    --eval-interval 10
    --eval-prose-windows 8                 # what is forgotten: perplexity of 8 windows of 512 tokens
    --grpo-prompts-per-step 4
    --grpo-group-size 8                    # responses to each
    --global-batch-size 32                 # one optimizer step a rollout batch
    --micro-batch-size 4
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28
    --grpo-kl-beta 0
    --rl-default-temperature 1.0
    --inference-max-requests 32
    --count-bf16-changes
    --train-iters 40
    --lr 1e-5
    --lr-decay-style constant
    --weight-decay 0.01
    --clip-grad 1.0
    --log-interval 1
    --ckpt-format torch_dist
    --exit-signal-handler                  # SIGTERM and SIGUSR1: save, and end; the same call goes on
    --save-interval 20
    --save-retain-interval 1000            # of the earlier checkpoints none stays
)
if [[ $GPUS != 0 ]]; then                  # with a buffer of 1 GB a run took 7 GB of an H100
    FLAGS+=(
        --bf16 --transformer-impl transformer_engine
        --use-distributed-optimizer --no-gradient-accumulation-fusion
        --inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb 4
        --rl-kv-cache-management-mode recompute
    )
fi
FLAGS+=("$@")

for objective in $OBJECTIVES; do
    case $objective in
        grpo | dapo | kl_cov) ;;
        *) echo "OBJECTIVES has $objective; known: grpo dapo kl_cov" >&2; exit 2 ;;
    esac
done
for arm in $ARMS; do
    case $arm in
        dense | high | low | random | gradient | weight-norm | high-fixed | random-fixed) ;;
        *) echo "ARMS has $arm; known: dense high low random gradient weight-norm high-fixed random-fixed" >&2; exit 2 ;;
    esac
done
if [[ ! -d $HF_DIR || ! -d $START ]]; then
    [[ -n ${MODEL:-} ]] || { echo "there is no $HF_DIR or no $START: call make observe first" >&2; exit 2; }
    python tools/convert_hf_to_megatron.py --hf-dir "$HF_DIR" --save "$START"
fi

# runs of other flags must not be compared with these
mkdir -p "$OUT"
settings="$HF_DIR GPUS=$GPUS ${FLAGS[*]}"
if [[ -f $OUT/settings.txt && "$(cat "$OUT/settings.txt")" != "$settings" ]]; then
    echo "$OUT holds runs of other settings: $(cat "$OUT/settings.txt"); give another OUT" >&2
    exit 2
fi
echo "$settings" >"$OUT/settings.txt"

one() {                                    # objective, arm, seed, flags
    local dir="$OUT/$1/$2/seed-$3" own=(--seed "$3") launch=(--nproc-per-node 1 -m megatron_longact.run --cpu)
    local special=()
    case $1 in
        grpo) ;;
        dapo)                              # its clip-higher is above
            special=(--policy-loss dapo --loss-aggregation token-mean --grpo-iterations 2)
            special+=(--grpo-filter-groups-with-same-reward --max-sampling-rounds 3)  # dynamic sampling
            ;;
        kl_cov)                            # the paper's share of tokens, 0.0002, is not one token of this small batch
            special=(--policy-loss kl-cov --kl-cov-ratio 0.02 --kl-cov-coef 1.0)
            special+=(--loss-aggregation token-mean --grpo-iterations 2)
            ;;
    esac
    case $2 in
        dense) ;;
        *-fixed) own+=(--longact --longact-select "${2%-fixed}" --longact-refresh-interval 0 --longact-seed "$3") ;;
        *) own+=(--longact --longact-select "$2" --longact-seed "$3") ;;
    esac
    [[ -f $dir/report.md ]] && return
    [[ $MINUTES == 0 ]] || own+=(--exit-duration-in-mins "$MINUTES")
    [[ $GPUS == 0 ]] || launch=(--nproc-per-node "$GPUS" -m megatron_longact.run)
    mkdir -p "$dir"
    echo "$dir"
    CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TORCH_LOGS=-all TORCH_CPP_LOG_LEVEL=ERROR \
        torchrun --standalone "${launch[@]}" examples/train_grpo.py \
        --use-checkpoint-args --pretrained-checkpoint "$START" --load "$dir/checkpoints" --save "$dir/checkpoints" \
        --run-dir "$dir" --tensorboard-dir "$dir/tensorboard" "${special[@]}" "${@:4}" "${own[@]}" \
        >>"$dir/output.log" 2>&1 </dev/null ||
        echo "$dir did not come to its end: see $dir/output.log"
}
export -f one

# a seed at a time: what is there after a while is a smaller comparison, not half of one
for seed in $SEEDS; do
    for objective in $OBJECTIVES; do
        for arm in $ARMS; do
            echo "$objective $arm $seed"
        done
    done
done | xargs -P "$JOBS" -L 1 bash -c "one \"\$@\" $(printf '%q ' "${FLAGS[@]}")" one
