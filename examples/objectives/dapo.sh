#!/usr/bin/env bash
# DAPO (arXiv 2503.14476): clip-higher, dynamic sampling, token-level loss, soft overlong punishment.
#
#     bash examples/objectives/dapo.sh              with LongAct, in runs/dapo
#     DENSE=1 bash examples/objectives/dapo.sh      the same without it, in runs/dapo-dense
#     SEED=2 bash examples/objectives/dapo.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/dapo.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/dapo-dense}
OBJECTIVE_ARGS=(
    --policy-loss dapo
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28                 # clip-higher: unlikely tokens may grow faster
    --loss-aggregation token-mean               # each token counts alike: long responses weigh more
    --grpo-filter-groups-with-same-reward       # dynamic sampling: groups whose rewards are all equal are thrown out
    --max-sampling-rounds 10                    # and others sampled, at most so many times a batch
    --overlong-buffer-length 4                  # the reward falls over the last 4 of the 16 response tokens
    --overlong-penalty-factor 0.5               # by this much at full length
    --grpo-kl-beta 0                            # no KL penalty
)
RUN_DIR=${RUN_DIR:-runs/dapo} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
