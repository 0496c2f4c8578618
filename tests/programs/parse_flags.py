"""Parses and validates flags as a Megatron program on WORLD_SIZE ranks would, and starts nothing."""

if __name__ == "__main__":
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    layout = (args.tensor_model_parallel_size, args.context_parallel_size, args.data_parallel_size)
    print("valid: tp, cp, dp", *layout, "perform_rl_step", args.perform_rl_step, "longact", args.longact)
