#!/usr/bin/env bash
# KL-Cov on the node of this job, by the recipe RECIPE: what examples/slurm/ablation.sh calls with
# OBJECTIVE_DIR=examples/slurm/objectives. RUN_DIR, SEED and DENSE as in examples/objectives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
OBJECTIVE_ARGS=(
    --policy-loss kl-cov
    --kl-cov-ratio 0.002                        # share of the tokens, the authors' for 7B
    --kl-cov-coef 1.0                           # weight of their |log p - log p_old|
    --loss-aggregation token-mean
    --grpo-kl-beta 0
)
exec bash examples/slurm/single_node.sh "${OBJECTIVE_ARGS[@]}" "$@"
