"""Responses from megatron-core's engines."""
