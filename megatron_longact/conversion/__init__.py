"""Checkpoints between Hugging Face and Megatron: streaming, on any machine, with LongAct's masks."""
