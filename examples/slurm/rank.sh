#!/usr/bin/env bash
# One rank: what `srun` starts for each task. Runs the command after it under the names that torch.distributed reads, hands
# signals on, and says which rank on which node ended badly.
#
#     srun ... bash examples/slurm/rank.sh python -m megatron_longact.run ...
#     DRY_RUN=1 ...                              prints the command with its environment instead
set -euo pipefail

export RANK=$SLURM_PROCID              # of all ranks
export LOCAL_RANK=$SLURM_LOCALID       # of this node's: which GPU it takes
export NODE_RANK=$SLURM_NODEID
export WORLD_SIZE=$SLURM_NTASKS
node=${SLURMD_NODENAME:-$(hostname -s)}

if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%s rank %s:' "$node" "$RANK"
    for name in RANK LOCAL_RANK NODE_RANK WORLD_SIZE ${JOB_ENVIRONMENT:-}; do
        printf ' %s=%q' "$name" "${!name}"
    done
    printf ' %q' "$@"
    echo
    exit
fi

"$@" &
program=$!
trap 'kill -USR1 "$program" 2>/dev/null || true' USR1
trap 'kill -TERM "$program" 2>/dev/null || true' TERM
code=0
while true; do
    wait "$program" && code=0 || code=$?
    kill -0 "$program" 2>/dev/null || break        # a signal ends `wait`, not the program
done
case $code in
    0) ;;
    75) read -rt "${STOP_PAUSE:-10}" <> <(:) || true ;;    # saved and stopped: srun ends all ranks when the first one fails
    *) printf '%(%F %T)T rank %s on %s (local rank %s) ended with exit code %s\n' -1 "$RANK" "$node" "$LOCAL_RANK" "$code" >&2 ;;
esac
exit "$code"
