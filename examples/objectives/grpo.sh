#!/usr/bin/env bash
# GRPO (arXiv 2402.03300): advantages relative to a group, one clip, a KL penalty to the start model.
#
#     bash examples/objectives/grpo.sh              with LongAct, in runs/grpo
#     DENSE=1 bash examples/objectives/grpo.sh      the same without it, in runs/grpo-dense
#     SEED=2 bash examples/objectives/grpo.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/grpo.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/grpo-dense}
OBJECTIVE_ARGS=(
    --policy-loss grpo
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.2
    --loss-aggregation seq-mean-token-mean      # each response counts alike, whatever its length
    --grpo-kl-beta 0.001                        # weight of the KL penalty
    --kl-estimator k3                           # its low-variance, never negative estimate
)
RUN_DIR=${RUN_DIR:-runs/grpo} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
