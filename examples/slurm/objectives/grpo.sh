#!/usr/bin/env bash
# GRPO on the node of this job, by the recipe RECIPE: what examples/slurm/ablation.sh calls with
# OBJECTIVE_DIR=examples/slurm/objectives. RUN_DIR, SEED and DENSE as in examples/objectives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
OBJECTIVE_ARGS=(
    --policy-loss grpo
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.2
    --loss-aggregation seq-mean-token-mean      # each response counts alike, whatever its length
    --grpo-kl-beta 0.001                        # weight of the KL penalty to the start model,
    --kl-estimator k3                           # its low-variance, never negative estimate
    --offload-reference                         # whose weights wait in the host's memory
)
exec bash examples/slurm/single_node.sh "${OBJECTIVE_ARGS[@]}" "$@"
