"""Responses from Megatron's engines, one batch of them, and held-out evaluation."""
