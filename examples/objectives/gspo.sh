#!/usr/bin/env bash
# GSPO (arXiv 2507.18071): the ratio of a whole response, and a much narrower clip of it.
#
#     bash examples/objectives/gspo.sh              with LongAct, in runs/gspo
#     DENSE=1 bash examples/objectives/gspo.sh      the same without it, in runs/gspo-dense
#     SEED=2 bash examples/objectives/gspo.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/gspo.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/gspo-dense}
OBJECTIVE_ARGS=(
    --policy-loss gspo
    --grpo-clamp-eps-lower 3e-4                 # the ratio is a geometric mean over the response: it hardly moves
    --grpo-clamp-eps-upper 4e-4
    --loss-aggregation seq-mean-token-mean
    --grpo-iterations 2                         # four optimizer steps a rollout batch: the clip acts from the second on
    --grpo-kl-beta 0
)
RUN_DIR=${RUN_DIR:-runs/gspo} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
