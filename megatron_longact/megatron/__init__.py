"""All that knows `megatron.training`: its seams, checkpoints, programs, and Megatron without a GPU."""
