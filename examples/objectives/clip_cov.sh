#!/usr/bin/env bash
# Clip-Cov (arXiv 2505.22617): a few of the tokens that drive the entropy down are left out of the update.
#
# They are drawn at random, over the whole optimizer step, from those whose covariance of advantage and log-prob lies in
# a band. That takes a forward without gradient before each step but the first on a rollout batch.
#
#     bash examples/objectives/clip_cov.sh              with LongAct, in runs/clip_cov
#     DENSE=1 bash examples/objectives/clip_cov.sh      the same without it, in runs/clip_cov-dense
#     SEED=2 bash examples/objectives/clip_cov.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/clip_cov.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/clip_cov-dense}
OBJECTIVE_ARGS=(
    --policy-loss clip-cov
    --clip-cov-ratio 0.02                       # share of the tokens; the paper's 0.0002 of this small batch is not one token
    --clip-cov-lower 1.0                        # the band of the covariance
    --clip-cov-upper 5.0
    --grpo-clamp-eps-lower 1.0                  # the ordinary clip stays out of the way, as in the paper
    --grpo-clamp-eps-upper 1.0
    --grpo-iterations 2                         # four optimizer steps a rollout batch
    --loss-aggregation token-mean
    --grpo-kl-beta 0
)
RUN_DIR=${RUN_DIR:-runs/clip_cov} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
