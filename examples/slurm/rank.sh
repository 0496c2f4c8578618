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
signalled=""
# shellcheck disable=SC2329            # the traps call it
hand_on() {
    signalled=1
    kill "-$1" "$program" 2>/dev/null || true
}
trap 'hand_on USR1' USR1
trap 'hand_on TERM' TERM
wait "$program" && code=0 || code=$?
while [[ -n $signalled ]]; do          # a signal ends `wait`, not the program
    signalled=""
    wait "$program" 2>/dev/null && again=0 || again=$?
    ((again == 127)) || code=$again    # 127: it had been waited for to its end
done
case $code in
    0) ;;
    75) read -rt "${STOP_PAUSE:-10}" <> <(:) || true ;;     # saved and stopped: srun ends all ranks when one fails
    *)
        said="rank $RANK on $node (local rank $LOCAL_RANK) ended with exit code $code"
        printf '%(%F %T)T %s\n' -1 "$said" >&2
        ;;
esac
exit "$code"
