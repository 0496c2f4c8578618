#!/usr/bin/env bash
# Eight nodes with eight GPUs each; the Qwen3-32B recipe if RECIPE names no other. Submit it from the project's folder:
#
#     HF_DIR=my/Qwen3-32B START=my/qwen3-32b sbatch examples/slurm/multi_node.sh
#     HF_DIR=... START=... sbatch examples/slurm/multi_node.sh --train-iters 50       more flags for the program
#     DRY_RUN=1 bash examples/slurm/multi_node.sh          prints the command of every rank; needs no Slurm
#
# docs/slurm.md: the variables, and what happens on preemption.
#SBATCH --job-name=longact
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8            # a rank a GPU
#SBATCH --gpus-per-node=8
#SBATCH --exclusive                    # all cores of the node,
#SBATCH --mem=0                        # and all its memory
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900            # so many seconds before the end: save, then back into the queue. Longer than a
#                                        rollout, an optimizer step and a save together (rollout_time_s, step_time_s)
#SBATCH --requeue
#SBATCH --open-mode=append             # a job that comes back goes on in its log
#SBATCH --output=longact-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
[[ -f examples/slurm/common.sh ]] || { echo "submit it from the project's folder, not from $PWD" >&2; exit 2; }
source examples/slurm/common.sh
RECIPE=${RECIPE:-qwen3_32b}
run_job "$@"
