"""Layout alone: rollout batches, optimizer steps, micro-batches."""
