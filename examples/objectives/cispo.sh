#!/usr/bin/env bash
# CISPO (MiniMax-M1, arXiv 2506.13585): importance weights are clipped, and every token keeps its gradient.
#
#     bash examples/objectives/cispo.sh              with LongAct, in runs/cispo
#     DENSE=1 bash examples/objectives/cispo.sh      the same without it, in runs/cispo-dense
#     SEED=2 bash examples/objectives/cispo.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/cispo.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/cispo-dense}
OBJECTIVE_ARGS=(
    --policy-loss cispo
    --grpo-clamp-eps-lower 1.0                  # no lower bound, as in the paper
    --grpo-clamp-eps-upper 0.28                 # weights end at 1.28; the paper tunes this and does not name its value
    --loss-aggregation token-mean
    --grpo-iterations 2                         # four optimizer steps a rollout batch: the clip acts from the second on
    --grpo-kl-beta 0
)
RUN_DIR=${RUN_DIR:-runs/cispo} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
