#!/usr/bin/env bash
# Every objective with LongAct and without it, over seeds; on two cores under an hour. A run that is there already is
# not made again, so a broken-off comparison goes on when it is called again.
#
#     bash examples/objectives/compare.sh                       results in runs/objectives
#     SEEDS="1 2 3 4" OBJECTIVES="grpo dapo" bash examples/objectives/compare.sh
#     python tools/plot_objectives.py runs/objectives           curves and table
#
# All runs go twice through each of 8 rollout batches, in 32 optimizer steps, so that clips and penalties act.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=${OUT:-runs/objectives}
OBJECTIVES=${OBJECTIVES:-grpo dapo kl_cov clip_cov gspo cispo}
SEEDS=${SEEDS:-1 2}
JOBS=${JOBS:-2}            # runs at the same time, one rank each
FLAGS=(--grpo-iterations 2 --train-iters 32 --rl-prompts-per-eval 64 "$@")

one() {                    # objective, longact or dense, seed, flags
    local dir="$OUT/$1-$2-$3" dense=0
    [[ $2 == dense ]] && dense=1
    [[ -f "$dir/report.md" ]] && return
    echo "$dir"
    RANKS=1 DENSE=$dense SEED=$3 RUN_DIR=$dir bash "examples/objectives/$1.sh" "${@:4}" --overwrite >"$dir.log" 2>&1 ||
        echo "$dir failed: see $dir.log"
}
export -f one
export OUT

mkdir -p "$OUT"
for seed in $SEEDS; do
    for objective in $OBJECTIVES; do
        printf '%s\n' "$objective longact $seed" "$objective dense $seed"
    done
done | xargs -P "$JOBS" -L 1 bash -c "one \"\$@\" $(printf '%q ' "${FLAGS[@]}")" one
