"""The soft punishment of responses that come close to the longest one allowed."""

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_response_length: int, buffer_length: int, penalty_factor: float) -> Tensor:
    """What to add to the reward of a response for its length: between -penalty_factor and 0.

    lengths: [b], response tokens, the end-of-text token included. Returns [b], floating point: 0 up
    to max_response_length - buffer_length, from there a straight line down to -penalty_factor at
    max_response_length, and -penalty_factor beyond. Raises ValueError for a buffer that is not
    within the response or a negative factor.

    Source: DAPO, arXiv 2503.14476, 3.4, which has penalty_factor 1.
    """
    if not 0 < buffer_length <= max_response_length:
        raise ValueError(
            f"buffer_length is {buffer_length}; it must be at least 1 and at most max_response_length "
            f"{max_response_length}"
        )
    if not penalty_factor >= 0:
        raise ValueError(f"penalty_factor is {penalty_factor}; it must not be negative")
    exceeding = lengths - (max_response_length - buffer_length)
    return (-exceeding / buffer_length * penalty_factor).clamp(min=-penalty_factor, max=0)
