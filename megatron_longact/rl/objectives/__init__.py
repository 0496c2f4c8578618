"""What is optimised: advantages, policy losses, KL, and all of it as Megatron's forward step."""
