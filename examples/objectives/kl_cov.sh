#!/usr/bin/env bash
# KL-Cov (arXiv 2505.22617): a KL penalty on the tokens that drive the entropy down, in place of the clip.
#
# The tokens are those with the largest covariance of advantage and log-prob over the whole optimizer step. That takes
# a forward without gradient before each step but the first on a rollout batch, and acts only if there are several.
#
#     bash examples/objectives/kl_cov.sh              with LongAct, in runs/kl_cov
#     DENSE=1 bash examples/objectives/kl_cov.sh      the same without it, in runs/kl_cov-dense
#     SEED=2 bash examples/objectives/kl_cov.sh --train-iters 10      more flags are passed on
#     bash examples/objectives/kl_cov.sh --overwrite   begins anew where a run is there already
#
# The model, the tasks and what is not said here are the demo's (examples/demo/run.sh). Formulas: docs/algorithms.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${DENSE:-0} == 1 ]] && RUN_DIR=${RUN_DIR:-runs/kl_cov-dense}
OBJECTIVE_ARGS=(
    --policy-loss kl-cov
    --kl-cov-ratio 0.02                         # share of the tokens; the paper's 0.0002 of this small batch is not one token
    --kl-cov-coef 1.0                           # weight of their |log p - log p_old|
    --grpo-iterations 2                         # four optimizer steps a rollout batch
    --loss-aggregation token-mean
    --grpo-kl-beta 0
)
RUN_DIR=${RUN_DIR:-runs/kl_cov} exec bash examples/demo/run.sh "${OBJECTIVE_ARGS[@]}" "$@"
