#!/usr/bin/env bash
# Two nodes, a rank on each, no GPU: the demo's model for a few iterations. Shows in minutes whether a cluster starts, stops,
# requeues and resumes jobs as these scripts expect. Submit it from the project's folder:
#
#     sbatch examples/slurm/cpu_demo.sh                       results in runs/slurm-demo
#     scancel --signal=USR1 --batch JOB                       it saves, goes back into the queue, and goes on
#     DRY_RUN=1 bash examples/slurm/cpu_demo.sh
#SBATCH --job-name=longact-demo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=longact-demo-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
[[ -f examples/slurm/common.sh ]] || { echo "submit it from the project's folder, not from $PWD" >&2; exit 2; }
source examples/slurm/common.sh
RECIPE=cpu_demo
run_job "$@"
