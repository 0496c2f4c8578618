"""How a GPU cuts the tokens of a reduction: sizes of its kernel that can be known without one."""

TOKENS_OF_BLOCK, CHANNELS_OF_BLOCK = 32, 128
"""What a program of the GPU's kernel holds in registers."""

_PROGRAMS = 1024  # about so many, whatever the sizes: enough for the largest GPUs


def stretches(tokens: int, channels: int) -> tuple[int, int]:
    """Into how many stretches a GPU cuts the tokens, each reduced by programs of its own, and the tokens of one."""
    blocks = -(-channels // CHANNELS_OF_BLOCK)
    tokens_of_program = -(-tokens // max(1, _PROGRAMS // blocks))
    length = max(-(-tokens_of_program // TOKENS_OF_BLOCK), 1) * TOKENS_OF_BLOCK
    return -(-tokens // length), length
