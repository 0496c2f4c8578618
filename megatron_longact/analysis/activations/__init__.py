"""Q and K activations of Hugging Face and Megatron models."""
