#!/usr/bin/env bash
# DAPO on the node of this job, by the recipe RECIPE: what examples/slurm/ablation.sh calls with
# OBJECTIVE_DIR=examples/slurm/objectives. RUN_DIR, SEED and DENSE as in examples/objectives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
OBJECTIVE_ARGS=(
    --policy-loss dapo
    --grpo-clamp-eps-lower 0.2
    --grpo-clamp-eps-upper 0.28                 # clip-higher: unlikely tokens may grow faster
    --loss-aggregation token-mean               # each token counts alike: long responses weigh more
    --grpo-filter-groups-with-same-reward       # dynamic sampling: groups whose rewards are all equal are thrown out
    --max-sampling-rounds 10                    # and others sampled, at most so many times a batch
    --overlong-buffer-length 1024               # the reward falls over the last quarter of --max-response-length
    --overlong-penalty-factor 1                 # by this much at full length
    --grpo-kl-beta 0                            # no KL penalty
)
exec bash examples/slurm/single_node.sh "${OBJECTIVE_ARGS[@]}" "$@"
