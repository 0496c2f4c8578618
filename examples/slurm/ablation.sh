#!/usr/bin/env bash
# The ablation as an array job: a task a run, of examples/ablation/run.sh's selectors x objectives x seeds (60 of them).
# Submit it from the project's folder:
#
#     sbatch examples/slurm/ablation.sh                                   the demo's model, a CPU node's core a run
#     OBJECTIVES=grpo SEEDS="1 2 3 4 5 6 7 8" sbatch --array=0-39%20 examples/slurm/ablation.sh
#     OBJECTIVE_DIR=examples/slurm/objectives HF_DIR=... START=... sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 \
#         --exclusive --mem=0 --time=24:00:00 --signal=B:USR1@900 examples/slurm/ablation.sh      Qwen3-8B on eight GPUs a run
#     python tools/report_ablation.py runs/ablation                       when all have ended
#     DRY_RUN=1 bash examples/slurm/ablation.sh                           prints the command of every task
#
# A finished run is not made again. SIGUSR1 goes to the ranks of a GPU run, which save and go back into the queue; a run
# of the demo's model is begun anew, or goes on from its first iteration if Slurm has requeued it.
#SBATCH --job-name=longact-ablation
#SBATCH --array=0-59%8                 # eight at a time
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=longact-ablation-%A_%a.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
[[ -f examples/ablation/run.sh ]] || { echo "submit it from the project's folder, not from $PWD" >&2; exit 2; }

export OUT=${OUT:-runs/ablation} OBJECTIVE_DIR=${OBJECTIVE_DIR:-examples/objectives} RANKS=${RANKS:-1} JOBS=1
runs=()
for seed in ${SEEDS:-1 2 3 4}; do      # a seed at a time: what is there half-way is a smaller ablation
    for objective in ${OBJECTIVES:-grpo dapo kl_cov}; do
        for selector in ${SELECTORS:-high low random weight-norm dense}; do
            runs+=("$objective $selector $seed")
        done
    done
done

if [[ ${DRY_RUN:-0} == 1 ]]; then
    for task in "${!runs[@]}"; do
        read -r objective selector seed <<<"${runs[task]}"
        printf 'task %s: OUT=%q OBJECTIVE_DIR=%q RANKS=%q JOBS=1 ' "$task" "$OUT" "$OBJECTIVE_DIR" "$RANKS"
        printf 'OBJECTIVES=%q SELECTORS=%q SEEDS=%q bash examples/ablation/run.sh' "$objective" "$selector" "$seed"
        (($# == 0)) || printf ' %q' "$@"
        echo
    done
    exit
fi
task=${SLURM_ARRAY_TASK_ID:?start it with sbatch, or with DRY_RUN=1 to see what it would do}
((task < ${#runs[@]})) || { echo "task $task of ${#runs[@]} runs: give sbatch --array=0-$((${#runs[@]} - 1))" >&2; exit 2; }
read -r objective selector seed <<<"${runs[task]}"
export OBJECTIVES=$objective SELECTORS=$selector SEEDS=$seed

trap 'scancel --signal=USR1 "$SLURM_JOB_ID" || true' USR1      # to the ranks of a step, if there is one
bash examples/ablation/run.sh "$@" &
program=$!
while kill -0 "$program" 2>/dev/null; do wait "$program" || true; done
report=$OUT/$objective/$selector/seed-$seed/report.md
[[ -f $report ]] || { echo "no $report: the run failed, its output.log says why" >&2; exit 1; }
