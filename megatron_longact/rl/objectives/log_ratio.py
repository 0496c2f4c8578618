"""Bounds of log-ratios before `exp`. Each is a part of a loss's definition, so one cannot stand for the other."""

MAX_LOG_RATIO = 20.0
"""Of a token's, from both sides: verl's, of its clipped losses, its k3 and its importance weights; exp(20) is far from
overflow."""

MAX_SEQUENCE_LOG_RATIO = 10.0
"""Of a response's mean one, from above: verl's, of GSPO."""

OVERFLOW_LOG_RATIO = 85.0
"""From above, where verl has no bound and a smaller one would be another loss (KL-Cov, Clip-Cov): exp(85) leaves fp32
room for a factor of 40."""
