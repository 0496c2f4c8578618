#!/usr/bin/env bash
# Which rows should be updated? Selectors x objectives x seeds, from the demo's start model: 60 runs, a few hours on two
# cores. A finished run is not made again, so a broken-off ablation goes on when it is called again.
#
#     bash examples/ablation/run.sh                                     results in runs/ablation
#     SEEDS="1 2 3 4 5 6 7 8" OBJECTIVES=grpo bash examples/ablation/run.sh     more seeds of one objective
#     bash examples/ablation/run.sh --train-iters 80 --rl-prompts-per-eval 512  larger; flags go to every run
#     python tools/report_ablation.py runs/ablation                     table, paired differences, picture
#
# Selectors: high is LongAct, low its opposite, random draws new rows at each refresh and random-fixed once,
# weight-norm takes the rows with the largest norm, gradient those with the largest gradient, high-fixed keeps the first
# selection of high, dense updates every row.
#
# A model of your own on GPUs: OBJECTIVE_DIR is a folder with one OBJECTIVE.sh each, called like those of
# examples/objectives: RUN_DIR, SEED, RANKS and DENSE in the environment, more flags as arguments, and DENSE=1 means no
# --longact. Then JOBS=1 RANKS=8 OBJECTIVE_DIR=my/objectives bash examples/ablation/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OUT=${OUT:-runs/ablation}
export OBJECTIVE_DIR=${OBJECTIVE_DIR:-examples/objectives}
export RANKS=${RANKS:-1}       # ranks of a run
SELECTORS=${SELECTORS:-high low random weight-norm dense}
OBJECTIVES=${OBJECTIVES:-grpo dapo kl_cov}
SEEDS=${SEEDS:-1 2 3 4}        # of tasks, held-out prompts, rollouts and random rows; alike for all selectors
JOBS=${JOBS:-2}                # runs at the same time
# twice through each of 8 rollout batches: the clips and penalties, in which the objectives differ, act
FLAGS=(--grpo-iterations 2 --train-iters 32 --rl-prompts-per-eval 128 "$@")

for selector in $SELECTORS; do
    case $selector in
        high | high-fixed | low | random | random-fixed | weight-norm | gradient | dense) ;;
        *)
            echo "SELECTORS has $selector; known: high high-fixed low random random-fixed weight-norm gradient dense" >&2
            exit 2
            ;;
    esac
done
for objective in $OBJECTIVES; do
    [[ -f "$OBJECTIVE_DIR/$objective.sh" ]] || { echo "$OBJECTIVE_DIR has no $objective.sh" >&2; exit 2; }
done

# runs of other flags must not be compared with these
mkdir -p "$OUT"
settings="$OBJECTIVE_DIR RANKS=$RANKS ${FLAGS[*]}"
if [[ -f "$OUT/settings.txt" && "$(cat "$OUT/settings.txt")" != "$settings" ]]; then
    echo "$OUT holds runs of other settings: $(cat "$OUT/settings.txt"); give another OUT" >&2
    exit 2
fi
echo "$settings" >"$OUT/settings.$$.tmp"
mv "$OUT/settings.$$.tmp" "$OUT/settings.txt"      # at once: the tasks of an array job read it

one() {                        # objective, selector, seed, flags
    local dir="$OUT/$1/$2/seed-$3" dense=0 chosen=()
    case $2 in
        dense) dense=1 ;;
        *-fixed) chosen=(--longact-select "${2%-fixed}" --longact-refresh-interval 0) ;;
        *) chosen=(--longact-select "$2") ;;
    esac
    [[ $dense == 1 ]] || chosen+=(--longact-seed "$3")
    [[ -f "$dir/report.md" ]] && return
    # a run of the demo's model that broke off is begun anew: minutes, and its rows are counted from the start weights
    [[ $OBJECTIVE_DIR -ef examples/objectives ]] && chosen+=(--overwrite)
    mkdir -p "$dir"
    echo "$dir"
    DENSE=$dense SEED=$3 RUN_DIR=$dir bash "$OBJECTIVE_DIR/$1.sh" "${@:4}" ${chosen[@]+"${chosen[@]}"} \
        >"$dir/output.log" 2>&1 </dev/null || echo "$dir failed: see $dir/output.log"
}
export -f one

# a seed at a time: what is there after an hour is a smaller ablation, not half of one
for seed in $SEEDS; do
    for objective in $OBJECTIVES; do
        for selector in $SELECTORS; do
            echo "$objective $selector $seed"
        done
    done
done | xargs -P "$JOBS" -L 1 bash -c "one \"\$@\" $(printf '%q ' "${FLAGS[@]}")" one
